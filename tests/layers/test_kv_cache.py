import pytest
import torch

from leedl_fast.layers import (
    KVCache,
    MultiHeadAttention,
    RotaryPositionalEncoding,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

WIDTH, HEADS, BATCH, SEQLEN = 32, 4, 3, 41
windows = pytest.mark.parametrize("window", [None, 0, 1, 6, 100, (5, 0)])
pieces = pytest.mark.parametrize(
    "sizes", [[1] * SEQLEN, [7] + [1] * 34, [1, 9, 1, 20, 1, 1, 8], [SEQLEN]], ids=str
)


def text(width=WIDTH):
    return torch.randn(BATCH, SEQLEN, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def in_pieces(call, x, sizes):
    return torch.cat([call(piece) for piece in x.split(sizes, dim=1)], dim=1)


@windows
@pieces
def test_attention_with_a_cache_is_attention(backend, window, sizes):
    layer = MultiHeadAttention(WIDTH, HEADS, num_heads_k=2, causal=True, window=window, rotary=True)
    cache = layer.new_cache()
    x = text()
    out = in_pieces(lambda piece: layer(piece, cache=cache), x, sizes)
    torch.testing.assert_close(out, layer(x))
    assert cache.length == SEQLEN


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_stacks_with_caches_are_the_stacks(norm_first, window):
    options = {"norm_first": norm_first, "causal": True, "window": window}
    encoder = TransformerEncoder(
        [TransformerEncoderLayer(WIDTH, HEADS, **options) for _ in range(2)]
    )
    caches = encoder.new_caches()
    out = in_pieces(lambda x: encoder(x, caches=caches), text(), [1] * SEQLEN)
    torch.testing.assert_close(out, encoder(text()))

    decoder = TransformerDecoder(
        [TransformerDecoderLayer(WIDTH, HEADS, **options) for _ in range(2)]
    )
    memory, lengths = text()[:, :9] + 1, torch.tensor([9, 2, 5])
    decoder_caches = decoder.new_caches()
    out = in_pieces(
        lambda x: decoder(x, memory, memory_lengths=lengths, caches=decoder_caches),
        text(),
        [1] * SEQLEN,
    )
    torch.testing.assert_close(out, decoder(text(), memory, memory_lengths=lengths))


def test_memory_is_projected_once():
    layer = MultiHeadAttention(WIDTH, HEADS)
    cache = KVCache()
    x = text()
    with torch.no_grad():
        first = layer(x, x[:, :9], cache=cache)
        again = layer(x, torch.full((BATCH, 9, WIDTH), torch.nan), cache=cache)
    torch.testing.assert_close(again, first)


def test_a_ring_keeps_the_window_alone():
    cache = KVCache(window=6)
    for position in range(1000):
        token = torch.full((2, 1, 1, 4), float(position))
        keys, values = cache.extend(token, -token)
        wanted = list(range(max(0, position - 6), position + 1))
        assert sorted(keys[0, 0, :, 0].tolist()) == wanted
        assert torch.equal(values, -keys)
    assert cache.kept[0].untyped_storage().nbytes() == 2 * 7 * 4 * 4


def test_samples_change_places():
    layer = MultiHeadAttention(WIDTH, HEADS, causal=True)
    x, samples = text(), torch.tensor([2, 2, 0])
    cache = layer.new_cache()
    with torch.no_grad():
        layer(x[:, :20], cache=cache)
        cache.reorder(samples)
        out = layer(x[:, 20:21], cache=cache)
    whole = torch.cat((x[samples, :20], x[:, 20:21]), dim=1)
    torch.testing.assert_close(out, layer(whole)[:, 20:])


@pytest.mark.parametrize("first", [0, 5000])  # before and after the end of the table
def test_rotation_depends_on_the_distance_alone(first):
    rotary = RotaryPositionalEncoding(8)
    q, k = torch.randn(2, 1, 1, 1, 8)
    products = [
        (rotary(q, offset=first + 3 + i) * rotary(k, offset=first + i)).sum() for i in range(5)
    ]
    torch.testing.assert_close(torch.stack(products), products[0].expand(5))
    position = torch.tensor(float(first + 3), dtype=torch.float64)
    expected = q[0, 0, 0, 1] * (position / 10).cos() - q[0, 0, 0, 5] * (position / 10).sin()
    torch.testing.assert_close(rotary(q, offset=first + 3)[0, 0, 0, 1].double(), expected)


def test_bad_input():
    layer = MultiHeadAttention(WIDTH, HEADS, causal=True)
    x = text()
    with pytest.raises(ValueError, match="cache must be None where gradients are enabled"):
        layer(x, cache=layer.new_cache())
    with pytest.raises(ValueError, match="causal must be True for a cache, got False"):
        MultiHeadAttention(WIDTH, HEADS).new_cache()
    with pytest.raises(ValueError, match="window must not be negative, got -1"):
        KVCache(window=-1)
    cache = layer.new_cache()
    with torch.no_grad():
        layer(x, cache=cache)
        with pytest.raises(ValueError, match=r"k must have shape \(3, 4, 1, 8\), as before"):
            layer(x[:2, :1], cache=cache)
        with pytest.raises(ValueError, match="caches must be one per layer, that is 1, got 2"):
            TransformerEncoder([TransformerEncoderLayer(WIDTH, HEADS)])(x, caches=[cache, cache])
    rotary = MultiHeadAttention(WIDTH, HEADS, rotary=True)
    with pytest.raises(ValueError, match="key must be None with rotary=True, got a tensor"):
        rotary(x, x)
