"""The forward pass of windowed attention in Triton; `leedl_fast.reference.attention` derives the
formulas.

The loop over key tiles has three parts: the tiles that the left edge of the window cuts, the
interior, which runs no mask code, and the tiles that the right edge, the causal diagonal or the end
of the keys cuts. Exponentials are powers of two of score * factor, with factor = |softmax_scale|
log2(e); the queries carry the sign of the scale, so that a row's largest score has its largest
exponent. fp fusion is off, and fma explicit: the sums and the statistics have to agree on the
rounding of the products.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels.attention_tiles import (
    blocks_for,
    dot,
    is_visible,
    key_end_of,
    key_tiles,
    load_rows,
    padded,
    precision,
    program_of,
    store_rows,
)

_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _forward_loop(
    acc,
    row_max,
    row_sum,
    q,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    query,
    begin,
    end,
    window,
    factor,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over key tiles begin .. end - 1."""
    key_end = window[4]
    for tile in range(begin, end):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key, k_stride, key_end, HEAD_DIM, BLOCK_D, MASKED)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = dot(q, tl.trans(k), zeros, PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            visible = is_visible(query[:, None], key[None, :], window)
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        base = new_max * factor
        if MASKED:  # rows that have seen no key yet
            base = tl.where(new_max == float("-inf"), 0.0, base)
        p = tl.exp2(tl.fma(scores, factor, -base[:, None]))
        # Of products rounded alike, not an fma: earlier sums must stay relative to their base.
        rescale = tl.exp2(row_max * factor - base)
        row_sum = tl.fma(row_sum, rescale, tl.sum(p, 1))
        row_max = new_max
        v = load_rows(v_ptr, key, v_stride, key_end, HEAD_DIM_V, BLOCK_DV, MASKED)
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None], PRECISION)  # [BLOCK_M, BLOCK_DV]
    return acc, row_max, row_sum


@triton.jit
def _forward_kernel(
    out_ptr,
    lse_ptr,
    row_max_ptr,
    row_sum_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    key_lengths_ptr,
    out_stride_b,
    out_stride_h,
    out_stride_m,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    num_heads,
    group,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    factor,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program owns BLOCK_M queries of one head."""
    tile, head, batch = program_of(tl.cdiv(seqlen_q, BLOCK_M), num_heads)
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head // group * k_stride_h
    v_ptr += batch * v_stride_b + head // group * v_stride_h
    key_end = key_end_of(key_lengths_ptr, batch, seqlen_k)
    window = (seqlen_k - seqlen_q, window_left, window_right, seqlen_q, key_end)
    first = tile * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)
    begin, inner_begin, inner_end, end = key_tiles(
        first, tl.minimum(first + BLOCK_M, seqlen_q), window, BLOCK_N
    )

    q = load_rows(q_ptr, query, q_stride_m, seqlen_q, HEAD_DIM, BLOCK_D, True)
    if SIGN != 1:
        q = (q.to(tl.float32) * SIGN).to(q.dtype)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            start, stop = begin, inner_begin
        elif part == 1:
            start, stop = inner_begin, inner_end
        else:
            start, stop = inner_end, end
        acc, row_max, row_sum = _forward_loop(
            acc,
            row_max,
            row_sum,
            q,
            k_ptr,
            v_ptr,
            k_stride_n,
            v_stride_n,
            query,
            start,
            stop,
            window,
            factor,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_M,
            BLOCK_N,
            PRECISION,
            part != 1,
        )

    # A row that sees no key has row_sum 0: zeros and lse = -inf.
    divisor = tl.where(row_sum > 0, row_sum, 1.0)
    out_ptr += batch * out_stride_b + head * out_stride_h
    out = acc / divisor[:, None]
    store_rows(out_ptr, out, query, out_stride_m, seqlen_q, HEAD_DIM_V, BLOCK_DV)
    row = (batch * num_heads + head) * seqlen_q + query
    lse = (row_max * factor + tl.log2(divisor)) * _LN2  # row_max is -inf where row_sum is 0
    tl.store(lse_ptr + row, lse, query < seqlen_q)
    tl.store(row_max_ptr + row, row_max, query < seqlen_q)
    tl.store(row_sum_ptr + row, row_sum, query < seqlen_q)


def forward(
    out: Tensor,
    lse: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    *,
    softmax_scale: float,
    window_left: int,
    window_right: int,
) -> None:
    """(batch, heads, seqlen, dim) tensors with a contiguous last dimension; the statistics (batch,
    num_heads, seqlen_q) and contiguous, float32.
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_heads_k, seqlen_k, head_dim_v = v.shape[1:]
    blocks = blocks_for("forward", q, v)
    programs = batch * num_heads * triton.cdiv(seqlen_q, blocks.own)
    if programs == 0:
        return
    _forward_kernel[(programs,)](
        out,
        lse,
        row_max,
        row_sum,
        q,
        k,
        v,
        key_lengths,
        *(stride for tensor in (out, q, k, v) for stride in tensor.stride()[:3]),
        num_heads,
        num_heads // max(num_heads_k, 1),
        seqlen_q,
        seqlen_k,
        window_left,
        window_right,
        abs(softmax_scale) * math.log2(math.e) or 1.0,
        SIGN=(softmax_scale > 0) - (softmax_scale < 0),
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_D=padded(head_dim),
        BLOCK_DV=padded(head_dim_v),
        BLOCK_M=blocks.own,
        BLOCK_N=blocks.step,
        PRECISION=precision(q.dtype),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        enable_fp_fusion=False,
    )
