import re

import pytest
import torch
from torch import nn

from leedl_fast.layers import AdditiveAttention, MultiHeadAttention
from leedl_fast.layers.attention_maps import record_attention
from leedl_fast.reference.attention import visible_keys

WIDTH, HEADS = 24, 3


class Plain(nn.Module):
    """The layer's formula, written with the (seqlen_q, seqlen_k, score_dim) tensor; it has the
    layer's own parameters."""

    def __init__(self, layer):
        super().__init__()
        for name, module in layer.named_children():
            self.add_module(name, module)
        self.score_weight = layer.score_weight

    def forward(self, query, key, value, mask):
        def heads(x):
            return x.unflatten(2, (self.score_weight.shape[0], -1)).transpose(1, 2)

        q, k, v = (
            heads(projection(x))
            for projection, x in (
                (self.q_proj, query),
                (self.k_proj, key),
                (self.v_proj, value),
            )
        )
        features = torch.tanh(q[:, :, :, None] + k[:, :, None])
        scores = (features @ self.score_weight[:, None, :, None]).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({}, (99, 99)),
        ({"causal": True, "score_dim": 13}, (99, 0)),
        ({"window": (2, 5)}, (2, 5)),
        ({"causal": True, "window": 4}, (4, 0)),
    ],
)
def test_self_attention_is_the_formula(backend, parity, options, sides, bias):
    layer = AdditiveAttention(WIDTH, HEADS, bias=bias, **options)
    mask = visible_keys(19, 19, *sides, None, torch.device("cpu"))
    parity(
        Plain(layer),
        layer,
        (torch.randn(2, 19, WIDTH),),
        lambda m, x: m(x, x, x, mask),
        lambda m, x: m(x),
    )


def test_cross_attention_is_the_formula(backend, parity):
    layer = AdditiveAttention(WIDTH)
    inputs = torch.randn(2, 5, WIDTH), torch.randn(2, 11, WIDTH), torch.randn(2, 11, WIDTH)
    plain = Plain(layer)
    parity(plain, layer, inputs, lambda m, q, k, v: m(q, k, v, None), lambda m, q, k, v: m(q, k, v))
    parity(plain, layer, inputs[:2], lambda m, q, k: m(q, k, k, None), lambda m, q, k: m(q, k))


def test_keys_beyond_key_lengths_change_nothing(backend):
    layer = AdditiveAttention(WIDTH, HEADS)
    query, key = torch.randn(2, 5, WIDTH), torch.randn(2, 11, WIDTH)
    lengths = torch.tensor([11, 4])
    expected = layer(query, key, key_lengths=lengths)
    key[1, 4:] = 1e3
    assert torch.equal(layer(query, key, key_lengths=lengths), expected)
    torch.testing.assert_close(expected[1], layer(query[1:], key[1:, :4])[0])


def test_weights_make_the_output(backend):
    layer = AdditiveAttention(WIDTH, HEADS, window=(2, 1), score_dim=5)
    x, lengths = torch.randn(2, 6, WIDTH), torch.tensor([6, 4])
    out, weights = layer(x, key_lengths=lengths, need_weights=True)
    assert torch.equal(out, layer(x, key_lengths=lengths))
    assert torch.equal(weights, layer.attention_weights(x, key_lengths=lengths))
    seen = visible_keys(6, 6, 2, 1, lengths, torch.device("cpu")).expand(2, HEADS, 6, 6)
    assert (weights[~seen] == 0).all()
    torch.testing.assert_close(weights.sum(-1), seen.any(-1).to(torch.float32))
    v = layer.v_proj(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
    expected = layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_maps_are_recorded(backend):
    model = nn.ModuleDict({"first": AdditiveAttention(WIDTH, HEADS)})
    query, key = torch.randn(1, 4, WIDTH), torch.randn(1, 7, WIDTH)
    with record_attention(model) as maps:
        model["first"](query, key)
    assert torch.equal(maps["first"], model["first"].attention_weights(query, key))
    assert maps["first"].shape == (1, HEADS, 4, 7)


@pytest.mark.parametrize(
    "make",
    [AdditiveAttention, lambda *sizes: MultiHeadAttention(*sizes, score="additive")],
    ids=["alone", "as a score"],
)
def test_under_autocast_it_follows_float32(backend, make):
    torch.manual_seed(0)
    layer, x = make(WIDTH, HEADS), torch.randn(2, 19, WIDTH)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.02 * expected.abs().max()
    out.sum().backward()
    assert layer.score_weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdditiveAttention(8, 0), "num_heads must be at least 1, got 0"),
        (lambda: AdditiveAttention(8, 3), r"positive multiple of num_heads \(3\), got 8"),
        (lambda: AdditiveAttention(8, score_dim=0), "score_dim must be at least 1, got 0"),
        (lambda: AdditiveAttention(8)(torch.ones(2, 3)), r"query must have shape \(batch, seqlen"),
        (
            lambda: AdditiveAttention(8)(torch.ones(1, 2, 8), torch.ones(1, 2, 7)),
            r"key must have shape \(batch, seqlen, 8\), got \(1, 2, 7\)",
        ),
        (
            lambda: AdditiveAttention(8)(torch.ones(1, 2, 8), None, torch.ones(1, 2, 8)),
            "key must be given when value is, got None",
        ),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:40] if isinstance(value, str) else "",
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
