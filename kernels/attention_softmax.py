"""The online softmax of the forward pass, for whole rows and for rows whose keys are split."""

import math

import triton
import triton.language as tl

from leedl_fast.kernels.attention_scores import LOG2_E, activation, is_kept, score
from leedl_fast.kernels.attention_tiles import dot, load_tile

_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _attend(
    acc,
    row_max,
    row_sum,
    q,
    k,
    v,
    rows,
    key_end,
    begin,
    end,
    call,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    BLOCK_M: tl.constexpr = acc.shape[0]
    for tile in range(begin, end):
        first = tile * BLOCK_N
        k_rows = load_tile(k, first, key_end, BLOCK_N, call.HEAD_DIM, call.BLOCK_D, MASKED)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        product = dot(q, tl.trans(k_rows), zeros, call.PRECISION)  # [BLOCK_M, BLOCK_N]
        key = (first + tl.arange(0, BLOCK_N))[None, :]
        scores, _ = score(product, rows, key, call, MASKED)
        if call.NORMALIZER == "softmax":
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            base = new_max * call.factor
            if MASKED or call.bias is not None:  # rows that have seen no key yet
                base = tl.where(new_max == float("-inf"), 0.0, base)
            p = tl.exp2(tl.fma(scores, call.factor, -base[:, None]))
            # Of products rounded alike, not an fma: earlier sums must stay relative to their base.
            rescale = tl.exp2(row_max * call.factor - base)
            row_sum = tl.fma(row_sum, rescale, tl.sum(p, 1))
            row_max = new_max
        else:
            p = activation(scores, call)
        if call.seed is not None:
            kept = is_kept(rows.query, rows, first, call, BLOCK_M, BLOCK_N)
            p = tl.where(kept, p, 0.0)
        v_rows = load_tile(v, first, key_end, BLOCK_N, call.HEAD_DIM_V, call.BLOCK_DV, MASKED)
        if call.NORMALIZER == "softmax":
            acc = acc * rescale[:, None]
        acc = dot(p.to(v_rows.dtype), v_rows, acc, call.PRECISION)  # [BLOCK_M, BLOCK_DV]
    return acc, row_max, row_sum


@triton.jit
def attend(
    q,
    k,
    v,
    rows,
    key_end,
    tiles,
    call,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(acc, row_max, row_sum) over the key tiles (begin, inner_begin, inner_end, end): the sum of
    p v, the largest score, and the sum of p, powers of two relative to row_max * factor. k and v
    are each a Matrix.
    """
    acc = tl.zeros((BLOCK_M, call.BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(3):
        acc, row_max, row_sum = _attend(
            acc,
            row_max,
            row_sum,
            q,
            k,
            v,
            rows,
            key_end,
            tiles[part],
            tiles[part + 1],
            call,
            BLOCK_N,
            part != 1,
        )
    return acc, row_max, row_sum


@triton.jit
def normalized(acc, base, row_sum, head, call):
    """(out, lse, base, inverse_sum), the last two as Statistics has them, with the sink of the
    head, a scalar or one per row, included.

    acc: [rows, columns], row_sum: [rows], relative to 2^base.
    """
    if call.sinks is not None:
        sink = tl.load(call.sinks + head) * LOG2_E
        largest = tl.maximum(base, sink)
        rescale = tl.exp2(base - largest)
        row_sum = tl.fma(row_sum, rescale, tl.exp2(sink - largest))
        acc = acc * rescale[:, None]
        base = largest
    # A row that sees nothing has row_sum 0 and base -inf: zeros and lse = -inf.
    is_empty = row_sum == 0
    divisor = tl.where(is_empty, 1.0, row_sum)
    lse = (base + tl.log2(divisor)) * _LN2
    base = tl.where(is_empty, 0.0, base)
    inverse_sum = tl.where(is_empty, 0.0, 1.0 / divisor)
    return acc / divisor[:, None], lse, base, inverse_sum
