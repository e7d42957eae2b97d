import pytest
import torch
from torch import nn

from leedl_fast import use_backend
from leedl_fast.models.sequence_encoder import (
    PieceEmbedding,
    SequenceEncoder,
    SequenceEncoderConfig,
)

SIZES = {"vocab_size": 11, "max_length": 16, "num_heads": 2, "embed_dim": 16, "dropout": 0.0}


def encoder(table=None, **options):
    torch.manual_seed(0)
    return SequenceEncoder(SequenceEncoderConfig(**SIZES | options), table).eval()


def tokens(*shape):
    return torch.randint(1, 11, shape, generator=torch.Generator().manual_seed(0))


def test_a_token_is_the_sum_of_its_pieces_and_piece_0_is_nothing():
    embedding = PieceEmbedding(11, 16, one_hot=False)
    pieces = torch.tensor([[[3, 5, 0], [4, 0, 0], [0, 0, 0]]])
    weight = embedding.weight
    expected = torch.stack((weight[3] + weight[5], weight[4], torch.zeros(16)))[None]
    torch.testing.assert_close(embedding(pieces), expected)
    embedding(pieces).sum().backward()
    assert (weight.grad[0] == 0).all()


def test_one_hot_input_is_the_same_function():
    embedding, one_hot = (PieceEmbedding(11, 16, one_hot=choice) for choice in (False, True))
    one_hot.load_state_dict(embedding.state_dict())
    pieces = torch.tensor([[[3, 5, 3], [4, 0, 0]]])
    for module in (embedding, one_hot):
        module(pieces).square().sum().backward()
    torch.testing.assert_close(one_hot(pieces), embedding(pieces))
    torch.testing.assert_close(one_hot.weight.grad, embedding.weight.grad)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "given", "none"])
def test_only_positions_tell_an_order(positions):
    """Without them a turned sequence has turned outputs."""
    table = torch.randn(16, 16) if positions == "given" else None
    model = encoder(table, positions=positions)
    x = tokens(2, 9)
    turned = model(x.flip(1)).flip(1)
    same = torch.allclose(turned, model(x), atol=1e-5)
    assert same == (positions == "none")


def test_given_positions_are_added_and_not_learnt():
    table = torch.randn(16, 16)
    model = encoder(table, positions="given", num_layers=0)
    x = tokens(1, 9)
    added = model(x) - encoder(positions="none", num_layers=0)(x)
    torch.testing.assert_close(added, table[None, :9])
    assert "positions.table" in model.state_dict()
    assert "positions.table" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "additive"},
        {"normalizer": "relu"},
        {"normalizer": "sigmoid"},
        {"window": 2},
        {"attention": False},
    ],
    ids=str,
)
def test_what_comes_after_a_length_changes_nothing_and_backends_agree(options):
    model = encoder(**options)
    x, lengths = tokens(2, 12, 3), torch.tensor([12, 7])
    hidden = model(x, lengths)
    torch.testing.assert_close(hidden[1:, :7], model(x[1:, :7]))
    with use_backend("eager"):
        torch.testing.assert_close(model(x, lengths), hidden)


@pytest.mark.parametrize(
    ("options", "seen"),
    [({"num_layers": 1}, range(12)), ({"num_layers": 1, "window": 2}, range(3, 8))],
)
def test_whom_a_token_sees(options, seen):
    assert influences(encoder(**options)) == list(seen)
    assert influences(encoder(**options, attention=False)) == [5]


def influences(model):
    """The places whose token changes the output at place 5."""
    x = tokens(1, 12)
    before = model(x)[0, 5]
    changed = []
    for place in range(12):
        other = x.clone()
        other[0, place] = x[0, place] % 10 + 1
        if not torch.allclose(model(other)[0, 5], before, atol=1e-7):
            changed.append(place)
    return changed


def test_without_attention_is_the_same_model_with_attention_left_out():
    whole, alone = encoder(positions="none"), encoder(positions="none", attention=False)
    for full, part in zip(whole.layers.layers, alone.layers.layers, strict=True):
        nn.init.zeros_(full.self_attn.out_proj.weight)
        nn.init.normal_(part.norm.weight)
        full.norm2.load_state_dict(part.norm.state_dict())
        full.linear1.load_state_dict(part.feed_forward.linear1.state_dict())
        full.linear2.load_state_dict(part.feed_forward.linear2.state_dict())
    whole.embedding.load_state_dict(alone.embedding.state_dict())
    torch.testing.assert_close(whole(tokens(2, 9)), alone(tokens(2, 9)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must not be negative, got -1"),
        ({"input": "two-hot"}, r"input must be one of \('embedding', 'one-hot'\), got 'two-hot'"),
        ({"positions": "left"}, "positions must be one of .*, got 'left'"),
        ({"score": "cosine"}, "score must be one of .*, got 'cosine'"),
        ({"normalizer": "tanh"}, "normalizer must be one of .*, got 'tanh'"),
        ({"score": "additive", "normalizer": "relu"}, "score 'additive' must have normalizer"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"positions": "given"}, "position_table must be given with positions .*, got None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        encoder(**options)


def test_bad_inputs():
    with pytest.raises(ValueError, match=r"tokens must have shape .*, got \(3,\)"):
        encoder()(tokens(3))
    with pytest.raises(ValueError, match="at most max_length = 16 positions, got 17"):
        encoder()(tokens(1, 17))
    with pytest.raises(ValueError, match=r"must have shape .* = \(16, 16\), got \(16, 8\)"):
        encoder(torch.zeros(16, 8), positions="given")
    with pytest.raises(ValueError, match="and only then, got a table with 'rotary'"):
        encoder(torch.zeros(16, 16))
