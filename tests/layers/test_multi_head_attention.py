import pytest
import torch
from torch import nn

from leedl_fast import use_backend
from leedl_fast.layers import MultiHeadAttention
from leedl_fast.layers.attention_maps import record_attention

WIDTH, HEADS = 48, 4


def visible(seqlen_q, seqlen_k, left, right):
    """torch's boolean mask (True hides) of an inclusive window, aligned bottom-right."""
    position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k)
    return ~((key >= position - left) & (key <= position + right))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({}, (99, 99)),
        ({"causal": True}, (99, 0)),
        ({"window": 3}, (3, 3)),
        ({"window": (2, 5)}, (2, 5)),
        ({"causal": True, "window": 4}, (4, 0)),
    ],
)
def test_self_attention_is_torchs(backend, parity, options, sides, bias):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True)
    x = torch.randn(2, 19, WIDTH)
    mask = visible(19, 19, *sides)
    parity(
        module,
        MultiHeadAttention.from_torch(module, **options),
        (x,),
        lambda m, x: m(x, x, x, attn_mask=mask, need_weights=False)[0],
        lambda m, x: m(x),
    )


def test_cross_attention_is_torchs(backend, parity):
    torch.manual_seed(1)
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    layer = MultiHeadAttention.from_torch(module)
    query, key, value = (
        torch.randn(2, 5, WIDTH),
        torch.randn(2, 11, WIDTH),
        torch.randn(2, 11, WIDTH),
    )

    def call_module(m, q, k, v):
        return m(q, k, v, need_weights=False)[0]

    parity(module, layer, (query, key, value), call_module, lambda m, q, k, v: m(q, k, v))
    parity(
        module,
        layer,
        (query, key),
        lambda m, q, k: call_module(m, q, k, k),
        lambda m, q, k: m(q, k),
    )


def test_key_lengths_are_torchs_padding_mask(backend, parity):
    torch.manual_seed(2)
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    lengths = torch.tensor([7, 3, 12])
    padding = torch.arange(12) >= lengths[:, None]
    parity(
        module,
        MultiHeadAttention.from_torch(module),
        (torch.randn(3, 12, WIDTH),),
        lambda m, x: m(x, x, x, key_padding_mask=padding, need_weights=False)[0],
        lambda m, x: m(x, key_lengths=lengths),
    )


def test_grouped_heads_are_repeated_heads(backend, parity):
    """With num_heads_k = 2 of 4 heads, each of k's and v's heads serves two of q's."""
    torch.manual_seed(3)
    layer = MultiHeadAttention(WIDTH, HEADS, num_heads_k=2)
    full = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    q, k, v = layer.in_proj_weight.detach().split([48, 24, 24])
    repeat = [x.unflatten(0, (2, 12)).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v)]
    with torch.no_grad():
        full.in_proj_weight.copy_(torch.cat([q, *repeat]))
        full.in_proj_bias.zero_()
        full.out_proj.load_state_dict(layer.out_proj.state_dict())
    x = torch.randn(2, 9, WIDTH)
    expected = full(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(layer(x), expected)


def test_heads_are_views(monkeypatch):
    """q, k and v reach the op as views of one projection, and its output is reshaped in place."""
    import leedl_fast.layers.attention as module

    seen = []

    def spy(q, k, v, **options):
        seen.extend([q, k, v])
        return attention(q, k, v, **options)

    attention = module.attention
    monkeypatch.setattr(module, "attention", spy)
    MultiHeadAttention(WIDTH, HEADS)(torch.randn(2, 9, WIDTH))
    assert len({x.untyped_storage().data_ptr() for x in seen}) == 1
    assert all(x.stride() == (9 * 3 * WIDTH, WIDTH // HEADS, 3 * WIDTH, 1) for x in seen)


def test_state_dicts_are_interchangeable():
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    layer = MultiHeadAttention(WIDTH, HEADS)
    module.load_state_dict(layer.state_dict())
    layer.load_state_dict(module.state_dict())


def test_from_torch_shares_nothing():
    module = nn.MultiheadAttention(WIDTH, HEADS).eval()
    layer = MultiHeadAttention.from_torch(module)
    assert not layer.training
    nn.init.zeros_(module.in_proj_weight)
    assert layer.in_proj_weight.abs().max() > 0


def test_attention_dropout_acts_in_training_only():
    module = MultiHeadAttention(WIDTH, HEADS, dropout=0.5)
    x = torch.randn(2, 5, WIDTH)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        MultiHeadAttention(WIDTH, HEADS, dropout=1.0)


@pytest.mark.parametrize("normalizer", ["softmax", "relu", "sigmoid"])
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_weights_make_the_output(score, normalizer):
    if score == "additive" and normalizer != "softmax":
        with pytest.raises(ValueError, match="score 'additive' must have normalizer 'softmax'"):
            MultiHeadAttention(WIDTH, HEADS, score=score, normalizer=normalizer)
        return
    module = MultiHeadAttention(WIDTH, HEADS, score=score, normalizer=normalizer, window=(2, 1))
    x, lengths = torch.randn(2, 6, WIDTH), torch.tensor([6, 4])
    out, weights = module(x, key_lengths=lengths, need_weights=True)
    assert weights.shape == (2, HEADS, 6, 6)
    assert torch.equal(out, module(x, key_lengths=lengths))
    places = torch.arange(6)[None, :] - torch.arange(6)[:, None]
    seen = (places >= -2) & (places <= 1) & (torch.arange(6) < lengths[:, None, None, None])
    assert (weights[~seen.expand_as(weights)] == 0).all()
    if normalizer == "softmax":
        rows = seen.any(-1).expand(2, HEADS, 6)
        torch.testing.assert_close(weights.sum(-1), rows.to(torch.float32))
    v = torch.nn.functional.linear(x, module.in_proj_weight[-WIDTH:], module.in_proj_bias[-WIDTH:])
    heads = v.unflatten(2, (HEADS, -1)).transpose(1, 2)
    expected = module.out_proj((weights @ heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_maps_of_a_models_attention():
    model = torch.nn.ModuleDict({"first": MultiHeadAttention(WIDTH, HEADS, causal=True)})
    x = torch.randn(1, 4, WIDTH)
    with record_attention(model) as maps:
        model["first"](x)
    assert torch.equal(maps["first"], model["first"].attention_weights(x))
    model["first"](torch.randn(1, 3, WIDTH))
    assert maps["first"].shape == (1, HEADS, 4, 4)


def test_maps_of_a_text_that_goes_on_in_a_cache():
    layer = MultiHeadAttention(WIDTH, HEADS, causal=True, window=2, rotary=True)
    model, cache, x = torch.nn.Sequential(layer), layer.new_cache(), torch.randn(1, 6, WIDTH)
    with torch.no_grad(), record_attention(model) as maps:
        layer(x[:, :4], key_lengths=None, cache=cache)
        layer(x[:, 4:5], cache=cache)
        layer(x[:, 5:], cache=cache)
    assert torch.equal(maps["0"], layer.attention_weights(x[:, :4]))


def test_empty_batch_and_empty_sequence():
    layer = MultiHeadAttention(WIDTH, HEADS)
    for shape in ((0, 5, WIDTH), (2, 0, WIDTH)):
        assert layer(torch.randn(shape)).shape == shape


def test_the_backend_asked_for_runs():
    layer = MultiHeadAttention(512, 1)  # a head wider than the kernels take
    x = torch.randn(1, 3, 512)
    assert layer(x).shape == x.shape  # the default falls back
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="cpu: head_dim must be at"):
        layer(x)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((50, 4), {}, r"embed_dim must be a positive multiple of num_heads \(4\), got 50"),
        ((48, 0), {}, "num_heads must be at least 1, got 0"),
        ((48, 4), {"num_heads_k": 3}, r"num_heads must be a multiple of num_heads_k \(3\), got 4"),
        ((48, 4), {"num_heads_k": 0}, "num_heads_k must be at least 1, got 0"),
    ],
)
def test_bad_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(*arguments, **options)


def test_bad_inputs():
    layer = MultiHeadAttention(WIDTH, HEADS)
    x = torch.randn(2, 5, WIDTH)
    with pytest.raises(
        ValueError, match=r"query must have shape \(batch, seqlen, 48\), got \(5, 48\)"
    ):
        layer(x[0])
    with pytest.raises(ValueError, match="key must have shape"):
        layer(x, torch.randn(2, 5, 47))
    with pytest.raises(ValueError, match="key must be given when value is, got None"):
        layer(x, None, x)
    with pytest.raises(ValueError, match="window must not be negative"):
        MultiHeadAttention(WIDTH, HEADS, window=-1)(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kdim": 24}, "kdim and vdim must equal embed_dim"),
        ({"add_zero_attn": True}, "add_bias_kv and add_zero_attn must be off"),
        ({"add_bias_kv": True}, "add_bias_kv and add_zero_attn must be off"),
    ],
)
def test_modules_that_cannot_be_copied(options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention.from_torch(nn.MultiheadAttention(WIDTH, HEADS, **options))
