"""Additive attention in Triton; `leedl_fast.reference.additive_attention` derives the formulas.

Scores are summed channel by channel, so that no (seqlen_q, seqlen_k, head_dim) tensor is made; the
one column of an accumulator that a channel changes is picked by a mask. A tile's gradients need its
scores again, and delta, which is made of the probabilities themselves.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 16  # queries and keys of a tile: larger ones spill in IEEE float32 products
_NUM_WARPS = 4


@triton.jit
def _tanh(x):
    """Infinite x included; NaN where x is."""
    t = tl.exp(-2 * tl.abs(x))
    y = (1 - t) / (1 + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def _key_end(key_lengths_ptr, batch, seqlen_k):
    """Keys from here on are padding, and are not read."""
    if key_lengths_ptr is not None:
        end = tl.minimum(tl.maximum(tl.load(key_lengths_ptr + batch), 0), seqlen_k).to(tl.int32)
    else:
        end = seqlen_k
    return end


@triton.jit
def _visible(query, key, shift, window_left, window_right, seqlen_q, key_end):
    position = query[:, None] + shift
    inside = (key[None, :] >= position - window_left) & (key[None, :] <= position + window_right)
    return inside & (query < seqlen_q)[:, None] & (key < key_end)[None, :]


@triton.jit
def _column(ptr, row, stride, row_end, c):
    """Column c of some rows, float32."""
    return tl.load(ptr + row.to(tl.int64) * stride + c, row < row_end, other=0).to(tl.float32)


@triton.jit
def _rows(ptr, row, stride, row_end, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Some rows, [rows, BLOCK], float32; zeros from DIM and row_end on."""
    column = tl.arange(0, BLOCK)
    mask = (row < row_end)[:, None] & (column < DIM)[None, :]
    pointer = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointer, mask, other=0).to(tl.float32)


@triton.jit
def _store_rows(ptr, tile, row, stride, row_end, DIM: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = (row < row_end)[:, None] & (column < DIM)[None, :]
    pointer = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointer, tile.to(ptr.dtype.element_ty), mask)


@triton.jit
def _scores(
    q_ptr,
    k_ptr,
    w_ptr,
    query,
    key,
    q_stride,
    k_stride,
    seqlen_q,
    key_end,
    HEAD_DIM,
    BLOCK: tl.constexpr,
):
    scores = tl.zeros((BLOCK, BLOCK), tl.float32)
    for c in range(HEAD_DIM):
        q = _column(q_ptr, query, q_stride, seqlen_q, c)
        k = _column(k_ptr, key, k_stride, key_end, c)
        scores += tl.load(w_ptr + c).to(tl.float32) * _tanh(q[:, None] + k[None, :])
    return scores


@triton.jit
def _forward_kernel(
    out_ptr,
    row_max_ptr,
    row_sum_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    w_ptr,
    key_lengths_ptr,
    out_batch_stride,
    out_head_stride,
    out_stride,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,
    v_batch_stride,
    v_head_stride,
    v_stride,
    num_heads,
    group,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK queries of one head."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head // group * k_head_stride
    v_ptr += batch * v_batch_stride + head // group * v_head_stride
    w_ptr += head * HEAD_DIM
    key_end = _key_end(key_lengths_ptr, batch, seqlen_k)
    shift = seqlen_k - seqlen_q
    first = tl.program_id(0) * BLOCK + shift
    begin = tl.maximum(first - window_left, 0) // BLOCK
    end = tl.cdiv(tl.minimum(tl.maximum(first + BLOCK + window_right, 0), key_end), BLOCK)

    row_max = tl.full((BLOCK,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_DIM_V), tl.float32)
    for tile in range(begin, end):
        key = tile * BLOCK + tl.arange(0, BLOCK)
        scores = _scores(
            q_ptr, k_ptr, w_ptr, query, key, q_stride, k_stride, seqlen_q, key_end, HEAD_DIM, BLOCK
        )
        visible = _visible(query, key, shift, window_left, window_right, seqlen_q, key_end)
        scores = tl.where(visible, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        offset = tl.where(new_max == -float("inf"), 0.0, new_max)  # -inf - -inf would be NaN
        rescale = tl.exp(row_max - offset)
        p = tl.exp(scores - offset[:, None])
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = _rows(v_ptr, key, v_stride, key_end, HEAD_DIM_V, BLOCK_DIM_V)
        acc = tl.dot(p, v, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max

    is_masked = row_sum == 0
    row_sum = tl.where(is_masked, 1.0, row_sum)
    out_ptr += batch * out_batch_stride + head * out_head_stride
    _store_rows(
        out_ptr, acc / row_sum[:, None], query, out_stride, seqlen_q, HEAD_DIM_V, BLOCK_DIM_V
    )
    statistics = pair * seqlen_q + query
    tl.store(row_max_ptr + statistics, tl.where(is_masked, float("inf"), row_max), query < seqlen_q)
    tl.store(row_sum_ptr + statistics, row_sum, query < seqlen_q)


@triton.jit
def _probabilities(scores, visible, row_max, row_sum):
    p = tl.exp(tl.where(visible, scores, -float("inf")) - row_max[:, None])
    return p / row_sum[:, None]


@triton.jit
def _query_kernel(
    dq_ptr,
    dw_ptr,
    delta_ptr,
    dout_ptr,
    row_max_ptr,
    row_sum_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    w_ptr,
    key_lengths_ptr,
    dq_batch_stride,
    dq_head_stride,
    dq_stride,
    dout_batch_stride,
    dout_head_stride,
    dout_stride,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,
    v_batch_stride,
    v_head_stride,
    v_stride,
    num_heads,
    group,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK queries of one head: their delta and dq, and their part of dw."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head // group * k_head_stride
    v_ptr += batch * v_batch_stride + head // group * v_head_stride
    w_ptr += head * HEAD_DIM
    dout_ptr += batch * dout_batch_stride + head * dout_head_stride
    dout = _rows(dout_ptr, query, dout_stride, seqlen_q, HEAD_DIM_V, BLOCK_DIM_V)
    statistics = pair * seqlen_q + query
    row_max = tl.load(row_max_ptr + statistics, query < seqlen_q, other=float("inf"))
    row_sum = tl.load(row_sum_ptr + statistics, query < seqlen_q, other=1)
    key_end = _key_end(key_lengths_ptr, batch, seqlen_k)
    shift = seqlen_k - seqlen_q
    first = tl.program_id(0) * BLOCK + shift
    begin = tl.maximum(first - window_left, 0) // BLOCK
    end = tl.cdiv(tl.minimum(tl.maximum(first + BLOCK + window_right, 0), key_end), BLOCK)

    delta = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    column = tl.arange(0, BLOCK_DIM)
    dq = tl.zeros((BLOCK, BLOCK_DIM), tl.float32)
    dw = tl.zeros((BLOCK_DIM,), tl.float32)
    for tile in range(begin, end):
        key = tile * BLOCK + tl.arange(0, BLOCK)
        scores = _scores(
            q_ptr, k_ptr, w_ptr, query, key, q_stride, k_stride, seqlen_q, key_end, HEAD_DIM, BLOCK
        )
        visible = _visible(query, key, shift, window_left, window_right, seqlen_q, key_end)
        p = _probabilities(scores, visible, row_max, row_sum)
        v = _rows(v_ptr, key, v_stride, key_end, HEAD_DIM_V, BLOCK_DIM_V)
        delta += tl.sum(p * tl.dot(dout, tl.trans(v), input_precision="ieee"), 1)
        total += tl.sum(p, 1)
    delta = delta / tl.where(total == 0, 1.0, total)
    tl.store(delta_ptr + statistics, delta, query < seqlen_q)
    for tile in range(begin, end):
        key = tile * BLOCK + tl.arange(0, BLOCK)
        scores = _scores(
            q_ptr, k_ptr, w_ptr, query, key, q_stride, k_stride, seqlen_q, key_end, HEAD_DIM, BLOCK
        )
        visible = _visible(query, key, shift, window_left, window_right, seqlen_q, key_end)
        p = _probabilities(scores, visible, row_max, row_sum)
        v = _rows(v_ptr, key, v_stride, key_end, HEAD_DIM_V, BLOCK_DIM_V)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        for c in range(HEAD_DIM):
            q = _column(q_ptr, query, q_stride, seqlen_q, c)
            k = _column(k_ptr, key, k_stride, key_end, c)
            y = _tanh(q[:, None] + k[None, :])
            u = tl.load(w_ptr + c).to(tl.float32) * tl.sum(ds * (1 - y * y), 1)
            dq += tl.where(column[None, :] == c, u[:, None], 0.0)
            dw += tl.where(column == c, tl.sum(tl.sum(ds * y, 1), 0), 0.0)
    dq_ptr += batch * dq_batch_stride + head * dq_head_stride
    _store_rows(dq_ptr, dq, query, dq_stride, seqlen_q, HEAD_DIM, BLOCK_DIM)
    dw_ptr += (pair * tl.num_programs(0) + tl.program_id(0)) * HEAD_DIM
    tl.store(dw_ptr + column, dw, column < HEAD_DIM)


@triton.jit
def _key_value_kernel(
    dk_ptr,
    dv_ptr,
    delta_ptr,
    dout_ptr,
    row_max_ptr,
    row_sum_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    w_ptr,
    key_lengths_ptr,
    dk_batch_stride,
    dk_head_stride,
    dk_stride,
    dv_batch_stride,
    dv_head_stride,
    dv_stride,
    dout_batch_stride,
    dout_head_stride,
    dout_stride,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,
    v_batch_stride,
    v_head_stride,
    v_stride,
    num_heads_k,
    group,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK keys of one key head: their dk and dv."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head_k = pair // num_heads_k, pair % num_heads_k
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k_ptr += batch * k_batch_stride + head_k * k_head_stride
    v_ptr += batch * v_batch_stride + head_k * v_head_stride
    key_end = _key_end(key_lengths_ptr, batch, seqlen_k)
    v = _rows(v_ptr, key, v_stride, key_end, HEAD_DIM_V, BLOCK_DIM_V)
    shift = seqlen_k - seqlen_q
    first = tl.program_id(0) * BLOCK
    last = tl.minimum(first + BLOCK, key_end)
    begin = tl.maximum(first - shift - window_right, 0) // BLOCK
    end = tl.cdiv(tl.minimum(tl.maximum(last - shift + window_left, 0), seqlen_q), BLOCK)
    end = tl.where(first < key_end, end, 0)

    column = tl.arange(0, BLOCK_DIM)
    dk = tl.zeros((BLOCK, BLOCK_DIM), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_DIM_V), tl.float32)
    for i in range(group):
        head = head_k * group + i
        head_q_ptr = q_ptr + batch * q_batch_stride + head * q_head_stride
        head_w_ptr = w_ptr + head * HEAD_DIM
        head_dout_ptr = dout_ptr + batch * dout_batch_stride + head * dout_head_stride
        for tile in range(begin, end):
            query = tile * BLOCK + tl.arange(0, BLOCK)
            statistics = (batch * num_heads_k * group + head) * seqlen_q + query
            row_max = tl.load(row_max_ptr + statistics, query < seqlen_q, other=float("inf"))
            row_sum = tl.load(row_sum_ptr + statistics, query < seqlen_q, other=1)
            delta = tl.load(delta_ptr + statistics, query < seqlen_q, other=0)
            dout = _rows(head_dout_ptr, query, dout_stride, seqlen_q, HEAD_DIM_V, BLOCK_DIM_V)
            scores = _scores(
                head_q_ptr,
                k_ptr,
                head_w_ptr,
                query,
                key,
                q_stride,
                k_stride,
                seqlen_q,
                key_end,
                HEAD_DIM,
                BLOCK,
            )
            visible = _visible(query, key, shift, window_left, window_right, seqlen_q, key_end)
            p = _probabilities(scores, visible, row_max, row_sum)
            ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
            dv = tl.dot(tl.trans(p), dout, dv, input_precision="ieee")
            for c in range(HEAD_DIM):
                q = _column(head_q_ptr, query, q_stride, seqlen_q, c)
                k = _column(k_ptr, key, k_stride, key_end, c)
                y = _tanh(q[:, None] + k[None, :])
                u = tl.load(head_w_ptr + c).to(tl.float32) * tl.sum(ds * (1 - y * y), 0)
                dk += tl.where(column[None, :] == c, u[:, None], 0.0)
    dk_ptr += batch * dk_batch_stride + head_k * dk_head_stride
    dv_ptr += batch * dv_batch_stride + head_k * dv_head_stride
    _store_rows(dk_ptr, dk, key, dk_stride, seqlen_k, HEAD_DIM, BLOCK_DIM)
    _store_rows(dv_ptr, dv, key, dv_stride, seqlen_k, HEAD_DIM_V, BLOCK_DIM_V)


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _options(q: Tensor, v: Tensor) -> dict[str, Any]:
    return {
        "HEAD_DIM": q.shape[3],
        "HEAD_DIM_V": v.shape[3],
        "BLOCK_DIM_V": _padded(v.shape[3]),
        "BLOCK": _BLOCK,
        "num_warps": _NUM_WARPS,
    }


def forward(
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_weight: Tensor,
    key_lengths: Tensor | None,
    *,
    window_left: int,
    window_right: int,
) -> None:
    batch, num_heads, seqlen_q, _ = q.shape
    if batch * num_heads * seqlen_q == 0:
        return
    _forward_kernel[triton.cdiv(seqlen_q, _BLOCK), batch * num_heads](
        *(out, row_max, row_sum, q, k, v, score_weight, key_lengths),
        *_strides(out, q, k, v),
        *(num_heads, num_heads // k.shape[1], seqlen_q, k.shape[2], window_left, window_right),
        **_options(q, v),
    )


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dscore_weight: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_weight: Tensor,
    key_lengths: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    *,
    window_left: int,
    window_right: int,
) -> None:
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_heads_k, seqlen_k = k.shape[1:3]
    tiles = triton.cdiv(seqlen_q, _BLOCK)
    delta = torch.empty_like(row_max)
    partial = row_max.new_empty(batch, num_heads, tiles, head_dim)
    inputs = dout, row_max, row_sum, q, k, v, score_weight, key_lengths
    sizes = seqlen_q, seqlen_k, window_left, window_right
    options = _options(q, v) | {"BLOCK_DIM": _padded(head_dim)}
    if batch * num_heads * seqlen_q > 0:
        _query_kernel[tiles, batch * num_heads](
            *(dq, partial, delta, *inputs),
            *_strides(dq, dout, q, k, v),
            *(num_heads, num_heads // num_heads_k, *sizes),
            **options,
        )
    if batch * num_heads_k * seqlen_k > 0:
        _key_value_kernel[triton.cdiv(seqlen_k, _BLOCK), batch * num_heads_k](
            *(dk, dv, delta, *inputs),
            *_strides(dk, dv, dout, q, k, v),
            *(num_heads_k, num_heads // num_heads_k, *sizes),
            **options,
        )
    torch.sum(partial, dim=(0, 2), out=dscore_weight)
