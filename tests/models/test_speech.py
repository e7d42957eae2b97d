import pytest
import torch

from leedl_fast.models.speech import IGNORED, FrameClassifier, SpeechConfig, UtteranceClassifier

SMALL = {"num_features": 5, "num_classes": 3, "max_length": 40, "num_heads": 2, "embed_dim": 16}


def config(**options):
    torch.manual_seed(0)
    return SpeechConfig(**SMALL | options)


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary", "none"])
def test_shapes(positions):
    frames = torch.randn(2, 40, 5)
    assert FrameClassifier(config(positions=positions))(frames).shape == (2, 40, 3)
    assert UtteranceClassifier(config(positions=positions))(frames).shape == (2, 3)


@pytest.mark.parametrize(("window", "reach"), [(0, 0), (2, 4), (None, 40)])
def test_a_window_limits_what_a_frame_sees(window, reach):
    """Two layers reach twice as far as one."""
    model = FrameClassifier(config(window=window)).eval()
    frames = torch.randn(1, 40, 5)
    other = frames.clone()
    other[0, 20] += 1
    changed = (model(frames) - model(other))[0].abs().amax(dim=1) > 1e-6
    distance = (torch.arange(40) - 20).abs()
    assert torch.equal(changed, distance <= reach)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("model_class", [FrameClassifier, UtteranceClassifier])
def test_padding_changes_nothing(model_class, window):
    model = model_class(config(window=window)).eval()
    frames, lengths = torch.randn(2, 30, 5), torch.tensor([30, 11])
    other = frames.clone()
    other[1, 11:] = 1e3
    out, same = (model(x, lengths) for x in (frames, other))
    alone = model(frames[1:, :11])
    if model_class is FrameClassifier:
        out, same = (x[1:, :11] for x in (out, same))
    else:
        out, same = (x[1:] for x in (out, same))
    torch.testing.assert_close(out, same)
    torch.testing.assert_close(out, alone)


def test_frames_are_standardised():
    frames = torch.randn(1, 9, 5)
    mean, deviation = torch.arange(5.0), torch.arange(1.0, 6.0)
    plain, shifted = (
        FrameClassifier(config(), *statistics).eval() for statistics in ((), (mean, deviation))
    )
    torch.testing.assert_close(shifted(frames * deviation + mean), plain(frames))


def test_ignored_targets_do_not_count():
    model = FrameClassifier(config()).eval()
    frames, targets = torch.randn(2, 12, 5), torch.randint(3, (2, 12))
    targets[1, 7:] = IGNORED
    kept = targets != IGNORED
    expected = torch.nn.functional.cross_entropy(model(frames)[kept], targets[kept])
    torch.testing.assert_close(model.loss(frames, targets), expected)


def test_bad_input():
    for options, message in (
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"embed_dim": -4}, "embed_dim must be at least 1, got -4"),
        ({"positions": "learned"}, "positions must be one of .* got 'learned'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**options)
    model = FrameClassifier(config())
    with pytest.raises(ValueError, match=r"shape \(batch, seqlen, 5\), got \(1, 9, 4\)"):
        model(torch.randn(1, 9, 4))
    with pytest.raises(ValueError, match="frames must be at most max_length = 40, got 41"):
        model(torch.randn(1, 41, 5))
    with pytest.raises(ValueError, match=r"mean must have shape \(5,\), got \(4,\)"):
        FrameClassifier(config(), torch.zeros(4))
