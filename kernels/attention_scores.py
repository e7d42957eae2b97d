"""From q . k to probabilities and back, for the kernels of both passes of attention;
`leedl_fast.reference.attention` derives the formulas.

Written for scores of any shape: what belongs to queries broadcasts along their axis.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from leedl_fast.kernels.attention_tiles import (
    Window,
    key_end_of,
    tile_in_pack,
    tile_of,
)
from leedl_fast.kernels.philox import philox4x32

LOG2_E = tl.constexpr(math.log2(math.e))
_STREAM = tl.constexpr(1)  # the last word of the counter, as leedl_fast.reference.philox says
_TANH_ODD_BELOW = tl.constexpr(0.6)
# (tanh(x) / x - 1) / x^2 as a polynomial in x^2 below 0.6, by weighted least squares; lowest first.
_TANH = tl.constexpr(
    tuple(
        map(
            float.fromhex,
            (
                "-0x1.55553ep-2",
                "0x1.1109dcp-3",
                "-0x1.b89edcp-5",
                "0x1.54e02ap-6",
                "-0x1.830c42p-8",
            ),
        )
    )
)


class Place(NamedTuple):
    """Where a program works: rows from `first` on of one sequence, of one head.

    sample: the number of the sequence, which is the batch unless sequences are packed; first_query
    and first_key: where it begins in its pack.
    """

    head: Any
    batch: Any
    sample: Any
    first: Any
    first_query: Any
    first_key: Any
    seqlen_q: Any
    seqlen_k: Any
    key_end: Any


class Rows(NamedTuple):
    """What queries bring to their scores: values that broadcast, or 0 where nothing asks for them.

    first, last: the keys that a query sees, both included; position: the key on its diagonal;
    bias: pointers to each query's row; stream: the query's head among all of all samples. Queries
    past the last one are not masked: their scores are finite, and nothing of them is stored.
    """

    first: Any
    last: Any
    position: Any
    query: Any
    slope: Any
    bias: Any
    stream: Any
    seed: Any


class RowStatistics(NamedTuple):
    """Zeros for rows that see no key or do not exist, and where the normalizer is not softmax."""

    base: Any
    inverse_sum: Any
    delta: Any


@triton.jit
def place_of(number, call, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """The place of the tile of this number: BLOCK queries of a head of q, or BLOCK keys of a head
    of k.
    """
    num_heads = call.num_heads // call.group if OF_KEYS else call.num_heads
    seqlen = call.seqlen_k if OF_KEYS else call.seqlen_q
    if call.cu_seqlens_q is not None:
        tiles = seqlen // BLOCK + call.num_sequences
        tile, head, batch = tile_of(number, tiles, num_heads)
        own = call.cu_seqlens_k if OF_KEYS else call.cu_seqlens_q
        sequence, first = tile_in_pack(own, tile, call.num_sequences, BLOCK)
        first_query = tl.load(call.cu_seqlens_q + sequence)
        first_key = tl.load(call.cu_seqlens_k + sequence)
        seqlen_q = (tl.load(call.cu_seqlens_q + sequence + 1) - first_query).to(tl.int32)
        seqlen_k = (tl.load(call.cu_seqlens_k + sequence + 1) - first_key).to(tl.int32)
        key_end = tl.where(first < (seqlen_k if OF_KEYS else seqlen_q), seqlen_k, 0)
        place = Place(
            head, batch, sequence, first, first_query, first_key, seqlen_q, seqlen_k, key_end
        )
    else:
        tile, head, batch = tile_of(number, tl.cdiv(seqlen, BLOCK), num_heads)
        key_end = key_end_of(call.key_lengths, batch, call.seqlen_k)
        place = Place(head, batch, batch, tile * BLOCK, 0, 0, call.seqlen_q, call.seqlen_k, key_end)
    return place


@triton.jit
def window_of(call, place):
    return Window(
        place.seqlen_k - place.seqlen_q,
        call.window_left,
        call.window_right,
        place.seqlen_q,
        place.key_end,
    )


@triton.jit
def head_of(x, batch, head, first_row):
    """The pointer to `first_row` of one head of x."""
    return x.ptr + batch * x.stride_b + head * x.stride_h + first_row * x.stride_m


@triton.jit
def statistics_row(call, place, head):
    """Where the statistics of a head's first query stand."""
    return (place.batch * call.num_heads + head) * call.seqlen_q + place.first_query


@triton.jit
def rows_of(call, window, batch, sample, head, query):
    position = query + window.shift
    first = tl.maximum(position - window.window_left, 0)
    last = tl.minimum(position + window.window_right, window.key_end - 1)
    slope, bias, stream, seed = 0, 0, 0, 0
    if call.alibi_slopes is not None:
        slope = tl.load(call.alibi_slopes + sample * call.alibi_stride_b + head)
    if call.bias is not None:
        # Queries past the end, which interior tiles do not mask, read the last row.
        bias = head_of(call.bias, batch, head, tl.minimum(query, call.seqlen_q - 1).to(tl.int64))
    if call.seed is not None:
        stream = (sample * call.num_heads + head).to(tl.uint32)
        seed = tl.load(call.seed)
    return Rows(first, last, position, query, slope, bias, stream, seed)


@triton.jit
def tanh(x):
    """Right to 2 units in the last place."""
    magnitude = tl.abs(x)
    saturating = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2_E)) + 1.0)
    square = x * x
    value = tl.full(x.shape, _TANH[4], tl.float32)
    for i in tl.static_range(4):
        value = tl.fma(value, square, tl.full(x.shape, _TANH[3 - i], tl.float32))
    odd = tl.fma(x * square, value, x)
    return tl.where(magnitude < _TANH_ODD_BELOW, odd, tl.where(x < 0, -saturating, saturating))


@triton.jit
def score(product, rows, key, call, MASKED: tl.constexpr):
    """(scores, and before softcap scales it their tanh) of products q . k; hidden keys get -inf."""
    visible = True
    if MASKED:
        visible = (key >= rows.first) & (key <= rows.last)
    scores = product
    capped = product
    if call.score_scale is not None:
        scores = scores * call.score_scale
    if call.softcap is not None:
        capped = tanh(scores)
        scores = capped * call.softcap
    if call.bias is not None:
        if MASKED:
            scores += tl.load(rows.bias + key, visible, other=0).to(tl.float32)
        else:
            scores += tl.load(rows.bias + key).to(tl.float32)
    if call.alibi_slopes is not None:
        distance = tl.abs(rows.position - key).to(tl.float32)
        scores -= rows.slope * distance
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    return scores, capped


@triton.jit
def is_kept(query, rows, first_key, call, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] of queries, [BLOCK_M, 1], and of keys from first_key, a multiple of 4, on:
    whether dropout keeps them; one counter gives the words of four keys.
    """
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.uint32)
    block = (first_key // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(
        zero + block[None, :],
        zero + query.to(tl.uint32),
        zero + rows.stream,
        zero + _STREAM,
        (rows.seed & 0xFFFFFFFF).to(tl.uint32),
        ((rows.seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= tl.full((1, 1), call.drop_below, tl.uint32)


@triton.jit
def activation(scores, call):
    """The probabilities of the other normalizers, which need no sum over a row."""
    if call.NORMALIZER == "relu":
        p = tl.maximum(scores, 0.0)
    else:
        p = 1.0 / (1.0 + tl.exp2(scores * -call.factor))
    return p


@triton.jit
def load_statistics(statistics, row, exists, call):
    """In the shape of row."""
    base, inverse_sum, delta = 0, 0, 0
    if call.NORMALIZER == "softmax":
        base = tl.load(statistics.base + row, exists, other=0)
        inverse_sum = tl.load(statistics.inverse_sum + row, exists, other=0)
        delta = tl.load(statistics.delta + row, exists, other=0)
    return RowStatistics(base, inverse_sum, delta)


@triton.jit
def probability(scores, statistics, call):
    """The probabilities, made again as the forward pass made them."""
    if call.NORMALIZER == "softmax":
        p = tl.exp2(tl.fma(scores, call.factor, -statistics.base)) * statistics.inverse_sum
    else:
        p = activation(scores, call)
    return p


@triton.jit
def score_gradient(p, dp, kept, statistics, rows, call, MASKED: tl.constexpr):
    """The gradient of the scores after cap, bias and slopes.

    dp: dout . v; kept: as from is_kept, or None.
    """
    if kept is not None:
        dp = tl.where(kept, dp * call.keep_scale, 0.0)
    if call.NORMALIZER == "softmax":
        if MASKED and call.sinks is None:
            # The probability of a query's only key is 1 whatever the score: its dp and delta, equal
            # but for their rounding, are left out of ds.
            dp = tl.where(rows.first == rows.last, 0.0, dp)
        ds = p * (dp - statistics.delta)
    elif call.NORMALIZER == "relu":
        ds = tl.where(p > 0, dp, 0.0)
    else:
        ds = p * (1.0 - p) * dp
    return ds


@triton.jit
def product_gradient(ds, capped, call):
    """The gradient of softmax_scale * q . k."""
    if call.softcap is not None:
        ds = ds * (1.0 - capped * capped)
    return ds
