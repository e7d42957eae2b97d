"""The backward pass of additive attention in Triton; `leedl_fast.reference.additive_attention`
derives the formulas.

The one column of an accumulator that a channel changes is picked by a mask. A tile's gradients need
its scores again, and delta, which is made of the probabilities themselves.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels.additive_attention import (
    BLOCK,
    NUM_WARPS,
    call_of,
    channel,
    float32_rows,
    pair_of,
    visible_scores,
    window_of,
)
from leedl_fast.kernels.attention_arguments import heads
from leedl_fast.kernels.attention_scores import head_of
from leedl_fast.kernels.attention_tiles import key_tiles, query_tiles, store_rows, tile_of


@triton.jit
def _p_and_dp(pair, query, key, v_rows, dout_rows, row_max_ptr, row_sum_ptr, row, window, HEAD_DIM):
    """Two tiles [queries, keys]: the probabilities, as the forward pass made them, and dout . v;
    row: where the statistics of the head's first query stand.
    """
    exists = query < window.seqlen_q
    row_max = tl.load(row_max_ptr + row + query, exists, other=float("inf"))
    row_sum = tl.load(row_sum_ptr + row + query, exists, other=1)
    scores = visible_scores(pair, query, key, window, HEAD_DIM)
    p = tl.exp(scores - row_max[:, None]) / row_sum[:, None]
    return p, tl.dot(dout_rows, tl.trans(v_rows), input_precision="ieee")


@triton.jit
def _query_kernel(
    dq,
    part_dweight_ptr,
    delta_ptr,
    dout,
    row_max_ptr,
    row_sum_ptr,
    q,
    k,
    v,
    call,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK queries of one head: their delta and dq, and their part of dweight."""
    HEAD_DIM_V: tl.constexpr = call.HEAD_DIM_V
    BLOCK_DV: tl.constexpr = call.BLOCK_DV
    tiles = tl.cdiv(call.seqlen_q, BLOCK)
    own, head, batch = tile_of(tl.program_id(0), tiles, call.num_heads)
    query = own * BLOCK + tl.arange(0, BLOCK)
    window = window_of(call, batch)
    head_k = head // call.group
    pair = pair_of(q, k, batch, head, head_k, call)
    do = float32_rows(dout, batch, head, query, call.seqlen_q, HEAD_DIM_V, BLOCK_DV)
    row = (batch * call.num_heads + head) * call.seqlen_q
    begin, _, _, end = key_tiles(own * BLOCK, (own + 1) * BLOCK, window, BLOCK)

    delta = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(begin, end):
        key = tile * BLOCK + tl.arange(0, BLOCK)
        v_rows = float32_rows(v, batch, head_k, key, window.key_end, HEAD_DIM_V, BLOCK_DV)
        p, dp = _p_and_dp(
            pair, query, key, v_rows, do, row_max_ptr, row_sum_ptr, row, window, call.HEAD_DIM
        )
        delta += tl.sum(p * dp, 1)
        total += tl.sum(p, 1)
    delta = delta / tl.where(total == 0, 1.0, total)
    tl.store(delta_ptr + row + query, delta, query < call.seqlen_q)

    column = tl.arange(0, call.BLOCK_D)
    acc = tl.zeros((BLOCK, call.BLOCK_D), tl.float32)
    dweight = tl.zeros((call.BLOCK_D,), tl.float32)
    for tile in range(begin, end):
        key = tile * BLOCK + tl.arange(0, BLOCK)
        v_rows = float32_rows(v, batch, head_k, key, window.key_end, HEAD_DIM_V, BLOCK_DV)
        p, dp = _p_and_dp(
            pair, query, key, v_rows, do, row_max_ptr, row_sum_ptr, row, window, call.HEAD_DIM
        )
        ds = p * (dp - delta[:, None])
        for c in range(call.HEAD_DIM):
            y, weight = channel(pair, query, key, window, c)
            u = weight * tl.sum(ds * (1 - y * y), 1)
            acc += tl.where(column[None, :] == c, u[:, None], 0.0)
            dweight += tl.where(column == c, tl.sum(tl.sum(ds * y, 1), 0), 0.0)
    dq_ptr = head_of(dq, batch, head, 0)
    store_rows(dq_ptr, acc, query, dq.stride_m, call.seqlen_q, call.HEAD_DIM, call.BLOCK_D)
    part = (batch * call.num_heads + head) * tiles + own
    part_dweight_ptr += part * call.HEAD_DIM
    tl.store(part_dweight_ptr + column, dweight, column < call.HEAD_DIM)


@triton.jit
def _key_value_kernel(
    dk,
    dv,
    delta_ptr,
    dout,
    row_max_ptr,
    row_sum_ptr,
    q,
    k,
    v,
    call,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK keys of one key head: their dk and dv."""
    HEAD_DIM_V: tl.constexpr = call.HEAD_DIM_V
    BLOCK_DV: tl.constexpr = call.BLOCK_DV
    tiles = tl.cdiv(call.seqlen_k, BLOCK)
    own, head_k, batch = tile_of(tl.program_id(0), tiles, call.num_heads // call.group)
    key = own * BLOCK + tl.arange(0, BLOCK)
    window = window_of(call, batch)
    v_rows = float32_rows(v, batch, head_k, key, window.key_end, HEAD_DIM_V, BLOCK_DV)
    begin, _, _, end = query_tiles(own * BLOCK, window, BLOCK, BLOCK)

    column = tl.arange(0, call.BLOCK_D)
    acc_dk = tl.zeros((BLOCK, call.BLOCK_D), tl.float32)
    acc_dv = tl.zeros((BLOCK, BLOCK_DV), tl.float32)
    for i in range(call.group):
        head = head_k * call.group + i
        pair = pair_of(q, k, batch, head, head_k, call)
        row = (batch * call.num_heads + head) * call.seqlen_q
        for tile in range(begin, end):
            query = tile * BLOCK + tl.arange(0, BLOCK)
            do = float32_rows(dout, batch, head, query, call.seqlen_q, HEAD_DIM_V, BLOCK_DV)
            p, dp = _p_and_dp(
                pair, query, key, v_rows, do, row_max_ptr, row_sum_ptr, row, window, call.HEAD_DIM
            )
            acc_dv = tl.dot(tl.trans(p), do, acc_dv, input_precision="ieee")
            delta = tl.load(delta_ptr + row + query, query < call.seqlen_q, other=0)
            ds = p * (dp - delta[:, None])
            for c in range(call.HEAD_DIM):
                y, weight = channel(pair, query, key, window, c)
                u = weight * tl.sum(ds * (1 - y * y), 0)
                acc_dk += tl.where(column[None, :] == c, u[:, None], 0.0)
    dk_ptr, dv_ptr = head_of(dk, batch, head_k, 0), head_of(dv, batch, head_k, 0)
    store_rows(dk_ptr, acc_dk, key, dk.stride_m, call.seqlen_k, call.HEAD_DIM, call.BLOCK_D)
    store_rows(dv_ptr, acc_dv, key, dv.stride_m, call.seqlen_k, HEAD_DIM_V, BLOCK_DV)


def backward(
    problem: Any,
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
) -> None:
    """Fills the gradients; the statistics as `additive_attention.forward` has them."""
    batch, num_heads = problem.batch, problem.num_heads
    query_blocks = triton.cdiv(problem.seqlen_q, BLOCK)
    key_programs = batch * problem.num_heads_k * triton.cdiv(problem.seqlen_k, BLOCK)
    delta = torch.empty_like(row_max)
    part_dweight = row_max.new_empty(batch, num_heads, query_blocks, problem.head_dim)
    inputs = heads(dout), row_max, row_sum, heads(q), heads(k), heads(v)
    call = call_of(problem, score_weight, key_lengths)
    if batch * num_heads * query_blocks > 0:
        _query_kernel[(batch * num_heads * query_blocks,)](
            heads(dq), part_dweight, delta, *inputs, call, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    if key_programs > 0:
        # Two accumulators: with as many warps as the others have, some of them would spill.
        _key_value_kernel[(key_programs,)](
            *(heads(dk), heads(dv), delta, *inputs, call), BLOCK=BLOCK, num_warps=2 * NUM_WARPS
        )
    torch.sum(part_dweight, dim=(0, 2), out=dscore_weight)
