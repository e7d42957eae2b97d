"""The backward pass of windowed attention in Triton; `leedl_fast.reference.attention` derives the
formulas.

Deterministic, without atomics: one kernel owns tiles of dk and dv and loops over the queries that
see them, one owns tiles of dq and loops over the keys that they see. Both make the probabilities
again from the scores and each row's maximum and sum of exponentials, as the forward pass made them:
p = exp2(score * factor - row_max * |factor|) / row_sum, with factor = softmax_scale log2(e).
"""

import math

import torch
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
    query_tiles,
    sees_one_key,
    store_rows,
)

_DELTA_BLOCK = 32


@triton.jit
def _delta_kernel(
    delta_ptr,
    dout_ptr,
    out_ptr,
    dlse_ptr,
    key_lengths_ptr,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    out_stride_b,
    out_stride_h,
    out_stride_m,
    num_heads,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = dout . out - dlse; one program owns BLOCK_M queries of one head."""
    tile, head, batch = program_of(tl.cdiv(seqlen_q, BLOCK_M), num_heads)
    dout_ptr += batch * dout_stride_b + head * dout_stride_h
    out_ptr += batch * out_stride_b + head * out_stride_h
    key_end = key_end_of(key_lengths_ptr, batch, seqlen_k)
    window = (seqlen_k - seqlen_q, window_left, window_right, seqlen_q, key_end)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dout = load_rows(dout_ptr, query, dout_stride_m, seqlen_q, HEAD_DIM_V, BLOCK_DV, True)
    out = load_rows(out_ptr, query, out_stride_m, seqlen_q, HEAD_DIM_V, BLOCK_DV, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    delta = tl.where(sees_one_key(query, window), 0.0, delta)
    row = (batch * num_heads + head) * seqlen_q + query
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, query < seqlen_q, other=0)
    tl.store(delta_ptr + row, delta, query < seqlen_q)


@triton.jit
def _load_statistics(row_max_ptr, row_sum_ptr, delta_ptr, row, exists, base_factor):
    """(row_max * |factor|, 1 / row_sum, delta), zeros for rows that see no key or do not exist."""
    row_max = tl.load(row_max_ptr + row, exists, other=0)
    row_sum = tl.load(row_sum_ptr + row, exists, other=0)
    delta = tl.load(delta_ptr + row, exists, other=0)
    is_empty = row_sum == 0
    base = tl.where(is_empty, 0.0, row_max * base_factor)
    return base, tl.where(is_empty, 0.0, 1.0 / tl.where(is_empty, 1.0, row_sum)), delta


@triton.jit
def _key_value_loop(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    row_max_ptr,
    row_sum_ptr,
    delta_ptr,
    q_stride_h,
    q_stride_m,
    dout_stride_h,
    dout_stride_m,
    key,
    group,
    begin,
    end,
    window,
    factor,
    base_factor,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what query tiles begin .. end - 1 of a group's heads give to dk and dv: one loop over
    heads and tiles, as two would need more registers. Scores are [keys, queries] here, so that none
    is transposed.
    """
    seqlen_q = window[3]
    tiles = end - begin
    for i in range(0, group * tiles):
        head = (i // tiles).to(tl.int64)
        query = (begin + i % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        row = head * seqlen_q + query
        base, inverse_sum, delta = _load_statistics(
            row_max_ptr, row_sum_ptr, delta_ptr, row, query < seqlen_q, base_factor
        )
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        head_ptr = q_ptr + head * q_stride_h
        q = load_rows(head_ptr, query, q_stride_m, seqlen_q, HEAD_DIM, BLOCK_D, MASKED)
        scores = dot(k, tl.trans(q), zeros, PRECISION)  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(tl.fma(scores, factor, -base[None, :])) * inverse_sum[None, :]
        if MASKED:
            p = tl.where(is_visible(query[None, :], key[:, None], window), p, 0.0)
        head_ptr = dout_ptr + head * dout_stride_h
        dout = load_rows(head_ptr, query, dout_stride_m, seqlen_q, HEAD_DIM_V, BLOCK_DV, MASKED)
        dv = dot(p.to(dout.dtype), dout, dv, PRECISION)  # [BLOCK_N, BLOCK_DV]
        dp = dot(v, tl.trans(dout), zeros, PRECISION)
        if MASKED:
            dp = tl.where(sees_one_key(query, window)[None, :], 0.0, dp)
        ds = p * (dp - delta[None, :])
        dk = dot(ds.to(q.dtype), q, dk, PRECISION)  # [BLOCK_N, BLOCK_D]
    return dk, dv


@triton.jit
def _key_value_kernel(
    dk_ptr,
    dv_ptr,
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    key_lengths_ptr,
    row_max_ptr,
    row_sum_ptr,
    delta_ptr,
    dk_stride_b,
    dk_stride_h,
    dk_stride_n,
    dv_stride_b,
    dv_stride_h,
    dv_stride_n,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    num_heads_k,
    group,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    softmax_scale,
    factor,
    base_factor,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program owns BLOCK_N keys of one head of k and v, for all query heads that read it."""
    tile, head_k, batch = program_of(tl.cdiv(seqlen_k, BLOCK_N), num_heads_k)
    k_ptr += batch * k_stride_b + head_k * k_stride_h
    v_ptr += batch * v_stride_b + head_k * v_stride_h
    key_end = key_end_of(key_lengths_ptr, batch, seqlen_k)
    window = (seqlen_k - seqlen_q, window_left, window_right, seqlen_q, key_end)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, inner_begin, inner_end, end = query_tiles(tile * BLOCK_N, window, BLOCK_N, BLOCK_M)

    k = load_rows(k_ptr, key, k_stride_n, key_end, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, key, v_stride_n, key_end, HEAD_DIM_V, BLOCK_DV, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    q_ptr += batch * q_stride_b + head_k * group * q_stride_h
    dout_ptr += batch * dout_stride_b + head_k * group * dout_stride_h
    row = (batch * num_heads_k + head_k) * group * seqlen_q
    for part in tl.static_range(3):
        if part == 0:
            start, stop = begin, inner_begin
        elif part == 1:
            start, stop = inner_begin, inner_end
        else:
            start, stop = inner_end, end
        dk, dv = _key_value_loop(
            dk,
            dv,
            k,
            v,
            q_ptr,
            dout_ptr,
            row_max_ptr + row,
            row_sum_ptr + row,
            delta_ptr + row,
            q_stride_h,
            q_stride_m,
            dout_stride_h,
            dout_stride_m,
            key,
            group,
            start,
            stop,
            window,
            factor,
            base_factor,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_N,
            BLOCK_M,
            PRECISION,
            part != 1,
        )
    dk_ptr += batch * dk_stride_b + head_k * dk_stride_h
    dv_ptr += batch * dv_stride_b + head_k * dv_stride_h
    store_rows(dk_ptr, dk * softmax_scale, key, dk_stride_n, seqlen_k, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, dv, key, dv_stride_n, seqlen_k, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def _query_loop(
    dq,
    q,
    dout,
    base,
    inverse_sum,
    delta,
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
    """Adds what key tiles begin .. end - 1 give to dq."""
    key_end = window[4]
    for tile in range(begin, end):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        k = load_rows(k_ptr, key, k_stride, key_end, HEAD_DIM, BLOCK_D, MASKED)
        scores = dot(q, tl.trans(k), zeros, PRECISION)  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(tl.fma(scores, factor, -base[:, None])) * inverse_sum[:, None]
        if MASKED:
            p = tl.where(is_visible(query[:, None], key[None, :], window), p, 0.0)
        v = load_rows(v_ptr, key, v_stride, key_end, HEAD_DIM_V, BLOCK_DV, MASKED)
        dp = dot(dout, tl.trans(v), zeros, PRECISION)
        if MASKED:
            dp = tl.where(sees_one_key(query, window)[:, None], 0.0, dp)
        ds = p * (dp - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq, PRECISION)  # [BLOCK_M, BLOCK_D]
    return dq


@triton.jit
def _query_kernel(
    dq_ptr,
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    key_lengths_ptr,
    row_max_ptr,
    row_sum_ptr,
    delta_ptr,
    dq_stride_b,
    dq_stride_h,
    dq_stride_m,
    dout_stride_b,
    dout_stride_h,
    dout_stride_m,
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
    softmax_scale,
    factor,
    base_factor,
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
    dout_ptr += batch * dout_stride_b + head * dout_stride_h
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
    dout = load_rows(dout_ptr, query, dout_stride_m, seqlen_q, HEAD_DIM_V, BLOCK_DV, True)
    row = (batch * num_heads + head) * seqlen_q + query
    base, inverse_sum, delta = _load_statistics(
        row_max_ptr, row_sum_ptr, delta_ptr, row, query < seqlen_q, base_factor
    )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            start, stop = begin, inner_begin
        elif part == 1:
            start, stop = inner_begin, inner_end
        else:
            start, stop = inner_end, end
        dq = _query_loop(
            dq,
            q,
            dout,
            base,
            inverse_sum,
            delta,
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
    dq_ptr += batch * dq_stride_b + head * dq_stride_h
    store_rows(dq_ptr, dq * softmax_scale, query, dq_stride_m, seqlen_q, HEAD_DIM, BLOCK_D)


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    *,
    softmax_scale: float,
    window_left: int,
    window_right: int,
) -> None:
    """(batch, heads, seqlen, dim) tensors with a contiguous last dimension; dlse and the statistics
    (batch, num_heads, seqlen_q) and contiguous, float32.
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_heads_k, seqlen_k, head_dim_v = v.shape[1:]
    group = num_heads // max(num_heads_k, 1)
    sizes = (seqlen_q, seqlen_k, window_left, window_right)
    factor = softmax_scale * math.log2(math.e)
    factors = (softmax_scale, factor, abs(factor))
    dims = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": padded(head_dim),
        "BLOCK_DV": padded(head_dim_v),
        "PRECISION": precision(q.dtype),
        "enable_fp_fusion": False,
    }

    def strides(*tensors: Tensor) -> tuple[int, ...]:
        return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])

    delta = torch.empty_like(row_max)
    if delta.numel():
        _delta_kernel[(batch * num_heads * triton.cdiv(seqlen_q, _DELTA_BLOCK),)](
            delta,
            dout,
            out,
            dlse,
            key_lengths,
            *strides(dout, out),
            num_heads,
            *sizes,
            HEAD_DIM_V=head_dim_v,
            BLOCK_DV=padded(head_dim_v),
            BLOCK_M=_DELTA_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
        blocks = blocks_for("query", q, v)
        _query_kernel[(batch * num_heads * triton.cdiv(seqlen_q, blocks.own),)](
            dq,
            dout,
            q,
            k,
            v,
            key_lengths,
            row_max,
            row_sum,
            delta,
            *strides(dq, dout, q, k, v),
            num_heads,
            group,
            *sizes,
            *factors,
            BLOCK_M=blocks.own,
            BLOCK_N=blocks.step,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            **dims,
        )
    if batch * num_heads_k * seqlen_k:
        blocks = blocks_for("key_value", q, v)
        _key_value_kernel[(batch * num_heads_k * triton.cdiv(seqlen_k, blocks.own),)](
            dk,
            dv,
            dout,
            q,
            k,
            v,
            key_lengths,
            row_max,
            row_sum,
            delta,
            *strides(dk, dv, dout, q, k, v),
            num_heads_k,
            group,
            *sizes,
            *factors,
            BLOCK_N=blocks.own,
            BLOCK_M=blocks.step,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            **dims,
        )
