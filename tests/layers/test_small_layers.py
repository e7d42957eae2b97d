"""AddLayerNorm, FeedForward and SinusoidalPositionalEncoding."""

import math

import pytest
import torch
from torch import nn

from leedl_fast.layers import AddLayerNorm, FeedForward, SinusoidalPositionalEncoding


@pytest.mark.parametrize("bias", [True, False])
def test_add_layer_norm_is_torchs(backend, parity, bias):
    torch.manual_seed(0)
    module = nn.LayerNorm(33, eps=1e-6, bias=bias)
    nn.init.normal_(module.weight)
    inputs = torch.randn(3, 5, 33), torch.randn(3, 5, 33)

    def both(normed, summed):
        return torch.cat((normed, summed))

    parity(
        module,
        AddLayerNorm.from_torch(module),
        inputs,
        lambda m, x, residual: both(m(x + residual), x + residual),
        lambda m, x, residual: both(*m(x, residual)),
    )


def test_rms_norm_is_torchs(backend, parity):
    torch.manual_seed(1)
    module = nn.RMSNorm(32, eps=1e-5)
    nn.init.normal_(module.weight)
    layer = AddLayerNorm(32, norm="rms")
    layer.load_state_dict(module.state_dict())
    inputs = torch.randn(7, 32), torch.randn(7, 32)
    parity(module, layer, inputs, lambda m, x, r: m(x + r), lambda m, x, r: m(x, r)[0])


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_without_residual_nothing_is_added(norm):
    layer = AddLayerNorm(16, norm=norm)
    nn.init.normal_(layer.weight)
    x = torch.randn(4, 16)
    normed, summed = layer(x)
    assert summed is x
    torch.testing.assert_close(normed, layer(x, torch.zeros_like(x))[0])


def test_add_layer_norm_bad_options():
    with pytest.raises(ValueError, match="embed_dim must be at least 1, got 0"):
        AddLayerNorm(0)
    with pytest.raises(ValueError, match="""norm must be "layer" or "rms", got 'batch'"""):
        AddLayerNorm(8, norm="batch")
    with pytest.raises(ValueError, match="module must have elementwise_affine and one"):
        AddLayerNorm.from_torch(nn.LayerNorm((4, 8)))
    with pytest.raises(ValueError, match="residual must have shape"):
        AddLayerNorm(8)(torch.randn(2, 8), torch.randn(3, 8))


@pytest.mark.parametrize(
    ("activation", "module"),
    [("relu", nn.ReLU()), ("gelu", nn.GELU()), ("gelu_tanh", nn.GELU("tanh")), ("silu", nn.SiLU())],
)
def test_feed_forward(activation, module):
    layer = FeedForward(8, 20, activation=activation)
    x = torch.randn(3, 5, 8)
    expected = nn.Sequential(layer.linear1, module, layer.linear2)(x)
    assert torch.equal(layer(x), expected)


def test_feed_forward_drops_hidden_values():
    layer = FeedForward(4, 1000, activation=torch.ones_like, dropout=0.5, bias=False)
    nn.init.ones_(layer.linear2.weight)
    kept = layer(torch.randn(1, 4))[0, 0].item() / 2
    assert kept == round(kept)
    assert 400 < kept < 600
    assert layer.eval()(torch.randn(1, 4))[0, 0].item() == 1000


def test_feed_forward_bad_options():
    with pytest.raises(ValueError, match=r"activation must be a function or one of .* got 'tanhh'"):
        FeedForward(8, activation="tanhh")
    with pytest.raises(ValueError, match="hidden_dim must be at least 1, got 0"):
        FeedForward(8, 0)


def test_positional_encoding_is_the_papers_formula():
    encoding = SinusoidalPositionalEncoding(6, max_length=70_000)
    x = torch.randn(2, 3, 6)
    for offset in (0, 1, 69_997):
        added = encoding(x, offset=offset) - x
        for p in range(3):
            for i in range(3):
                angle = (offset + p) / 10000 ** (2 * i / 6)
                assert added[0, p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert added[1, p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_positional_encoding_is_no_state_and_keeps_the_dtype():
    encoding = SinusoidalPositionalEncoding(8)
    assert not encoding.state_dict()
    assert encoding(torch.zeros(1, 4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_positional_encoding_bad_input():
    with pytest.raises(ValueError, match="embed_dim must be even and at least 2, got 7"):
        SinusoidalPositionalEncoding(7)
    encoding = SinusoidalPositionalEncoding(8, max_length=10)
    with pytest.raises(
        ValueError, match=r"positions must lie in \[0, max_length = 10\), got \[8, 11\)"
    ):
        encoding(torch.zeros(1, 3, 8), offset=8)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, seqlen, 8\), got \(3, 8\)"):
        encoding(torch.zeros(3, 8))
