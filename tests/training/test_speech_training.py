import wave

import numpy as np
import pytest
import torch

from leedl_fast.layers.attention_maps import record_attention
from leedl_fast.training.callbacks import held_out
from leedl_fast.training.engine import load_task, make_task, train
from leedl_fast.training.registry import configure
from leedl_fast.training.tasks.speech import segments, split_recordings

RATE = 8_000
TINY = {"num_layers": 1, "num_heads": 2, "embed_dim": 32, "dropout": 0.1, "warmup_steps": 5}


def write_wav(path, samples, rate=RATE):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 2**15).astype("<i2").tobytes())


def voice(generator, pitch, seconds):
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = pitch * generator.uniform(0.97, 1.03)
    tones = sum(0.1 * np.sin(2 * np.pi * k * pitch * time) for k in (1, 2, 3))
    return tones + 0.01 * generator.standard_normal(len(time))


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Ada's voice is 300 Hz, Ben's 450 Hz, for half a second each in turn."""
    folder = tmp_path_factory.mktemp("calls")
    generator = np.random.default_rng(0)
    for name in ("one", "two"):
        turns = [("ada", 300), ("ben", 450)] * 6
        write_wav(
            folder / f"{name}.wav",
            np.concatenate([voice(generator, pitch, 0.5) for _, pitch in turns]),
        )
        (folder / f"{name}.rttm").write_text(
            "".join(
                f"SPEAKER {name} 1 {0.5 * i:.2f} 0.50 <NA> <NA> {who} <NA> <NA>\n"
                for i, (who, _) in enumerate(turns)
            )
        )
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    generator = np.random.default_rng(0)
    for name, pitch in (("ada", 300), ("ben", 450), ("cleo", 600)):
        (folder / name).mkdir()
        for number in range(20):
            write_wav(
                folder / name / f"{number}.wav",
                voice(generator, pitch, generator.uniform(0.1, 0.5)),
            )
    return folder


def shown(task, **options):
    with held_out(task):
        return list(task.sample(task.SampleOptions(**options), None))


def test_it_learns_who_speaks_when(calls, tmp_path):
    run = configure("speech", data=str(calls), steps=60, max_length=60, ema_decay=0.8, **TINY)
    result = train(run, output=tmp_path / "run", quiet=True)
    assert result.metrics["frame_accuracy"] > 0.95 > 1.5 * result.metrics["majority_accuracy"]
    task = load_task(result.checkpoint, "speech")
    lines = [line.split() for line in shown(task, sound=str(calls / "one.wav"), shortest=0.2)]
    assert [who for _, _, who in lines] == ["ada", "ben"] * 6
    for number, (begin, end, _) in enumerate(lines):
        assert float(begin) == pytest.approx(0.5 * number, abs=0.05)
        assert float(end) == pytest.approx(0.5 * (number + 1), abs=0.05)
    assert "reference:\n" in shown(task)
    with held_out(task), record_attention(task.inference_model) as maps:
        list(task.sample(task.SampleOptions(), None))
    (weights,) = maps.values()
    assert weights.shape[1:] == (2, 60, 60)
    outside = (torch.arange(60)[:, None] - torch.arange(60)).abs() > 15
    assert (weights[..., outside] == 0).all()


def test_it_learns_whose_utterance_it_is(words, tmp_path):
    run = configure("speakers", data=str(words), steps=60, ema_decay=0.8, max_length=30, **TINY)
    result = train(run, output=tmp_path / "run", quiet=True)
    assert result.metrics["accuracy"] > 0.9
    difference = result.metrics["accuracy"] - result.metrics["logistic_regression_accuracy"]
    assert result.metrics["gain_over_logistic_regression"] == difference
    task = load_task(result.checkpoint, "speakers")
    (line,) = shown(task, sound=str(words / "cleo" / "3.wav"), candidates=1)
    assert " frames: cleo " in line
    assert all(f"(reference: {line.split()[2]})" in line for line in shown(task))


@pytest.mark.parametrize("variant", ["full attention", "no attention"])
def test_variants_train(calls, variant):
    run = configure("speech", variant, data=str(calls), steps=12, **TINY)
    result = train(run, quiet=True)
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("name", ["speech", "speakers"])
def test_eager_and_fused_runs_have_one_loss_curve(name, calls, words):
    data = str(calls if name == "speech" else words)
    run = configure(name, data=data, steps=8, **TINY)
    eager, fused = (train(run, backend=backend, quiet=True) for backend in ("eager", "cpu"))
    torch.testing.assert_close(
        torch.tensor(fused.losses), torch.tensor(eager.losses), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("name", ["speech", "speakers"])
def test_a_batch_is_a_function_of_its_number(name, calls, words):
    data = str(calls if name == "speech" else words)
    task, again = (make_task(configure(name, data=data, **TINY)) for _ in range(2))
    for one, other in zip(task.batch(7), again.batch(7), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(task.batch(7)[1], task.batch(8)[1])


def test_recordings_are_held_out_at_their_end(calls):
    data = make_task(configure("speech", data=str(calls), **TINY)).data
    for part, border in zip(split_recordings(data), (slice(418), slice(418, None)), strict=True):
        for (frames, labels), whole, names in zip(part, data.frames, data.labels, strict=True):
            assert torch.equal(frames, whole[border])
            assert torch.equal(labels, names[border])


def test_short_segments_join_the_one_before():
    labels = torch.tensor([1, 1, 1, 0, 1, 1, 2, 2, 2])
    assert segments(labels) == [(0, 3, 1), (3, 4, 0), (4, 6, 1), (6, 9, 2)]
    assert segments(labels, 2) == [(0, 6, 1), (6, 9, 2)]


def test_bad_input(calls, words, tmp_path):
    task = make_task(configure("speech", data=str(calls), **TINY))
    write_wav(tmp_path / "a.wav", np.zeros(4_000), rate=16_000)
    with pytest.raises(ValueError, match=r"sound must have 8000 samples per second, got 16000 in"):
        shown(task, sound=str(tmp_path / "a.wav"))
    with pytest.raises(ValueError, match="shortest must not be negative, got -1"):
        task.SampleOptions(shortest=-1)
    late = tmp_path / "late"
    late.mkdir()
    write_wav(late / "a.wav", np.zeros(8_000))
    (late / "a.rttm").write_text("SPEAKER a 1 0.9 0.1 <NA> <NA> ada\n")
    with pytest.raises(ValueError, match=r"labels in the first 70% .*, got \['nobody'\]"):
        make_task(configure("speech", data=str(late), **TINY))
    speakers = make_task(configure("speakers", data=str(words), **TINY))
    with pytest.raises(ValueError, match="candidates must be at least 1, got 0"):
        speakers.SampleOptions(candidates=0)
    speakers.about["rate"] = None
    with pytest.raises(ValueError, match="sound must be None where training was not on WAV files"):
        shown(speakers, sound=str(tmp_path / "a.wav"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["speech", "speakers"])
def test_bfloat16_follows_float32(calls, words, name, precision):
    data = str(calls if name == "speech" else words)
    changes = {"data": data, "steps": 3, "max_length": 20, **TINY}
    expected = train(configure(name, **changes), quiet=True)
    result = train(configure(name, **changes, precision=precision), quiet=True)
    assert result.losses == pytest.approx(expected.losses, rel=0.05)
