"""The backward pass of additive attention in Triton; `leedl_fast.reference.additive_attention`
derives the formulas.

A channel changes one column of dq or dk, and registers have no columns that a loop could pick: each
program adds its columns up in memory of its own. A tile's gradients need its scores again, and
delta, which is made of the probabilities themselves.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels.additive_attention import (
    BLOCK,
    channel,
    launch_of,
    pair_of,
    visible_scores,
    window_of,
)
from leedl_fast.kernels.attention_arguments import Heads
from leedl_fast.kernels.attention_scores import head_of
from leedl_fast.kernels.attention_tiles import key_tiles, query_tiles, store_rows, tile_of
from leedl_fast.kernels.launching import Launch, Launcher, strides_of


@triton.jit
def _head_at(x, batch, head):
    """One head of x, as Heads."""
    return Heads(head_of(x, batch, head, 0), 0, 0, x.stride_m)


@triton.jit
def _add(pointer, x):
    tl.store(pointer, tl.load(pointer) + x)


@triton.jit
def _p_and_dp(
    pair, dout, v, query, key, row_max_ptr, row_sum_ptr, row, window, dv_columns_ptr, call
):
    """Two tiles [queries, keys]: the probabilities, as the forward pass made them, and dout . v,
    channel by channel too; p . dout is added to the columns of dv unless they are None. dout and v:
    the Heads at a head's first row; row: where the statistics of the head's first query stand.
    """
    in_queries, in_keys = query < window.seqlen_q, key < window.key_end
    row_max = tl.load(row_max_ptr + row + query, in_queries, other=float("inf"))
    row_sum = tl.load(row_sum_ptr + row + query, in_queries, other=1)
    scores = visible_scores(pair, query, key, window, call.HEAD_DIM)
    p = tl.exp(scores - row_max[:, None]) / row_sum[:, None]
    dout_ptr = dout.ptr + query.to(tl.int64) * dout.stride_m
    v_ptr = v.ptr + key.to(tl.int64) * v.stride_m
    dp = tl.zeros((query.shape[0], key.shape[0]), tl.float32)
    for c in range(call.HEAD_DIM_V):
        do = tl.load(dout_ptr + c, in_queries, other=0).to(tl.float32)
        dp += do[:, None] * tl.load(v_ptr + c, in_keys, other=0).to(tl.float32)[None, :]
        if dv_columns_ptr is not None:
            _add(
                dv_columns_ptr + c * key.shape[0] + tl.arange(0, key.shape[0]),
                tl.sum(p * do[:, None], 0),
            )
    return p, dp


@triton.jit
def _clear(columns_ptr, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """DIM columns of BLOCK rows, one column after the other."""
    column = tl.arange(0, BLOCK_D)[None, :]
    pointer = columns_ptr + column * BLOCK + tl.arange(0, BLOCK)[:, None]
    tl.store(pointer, tl.zeros((BLOCK, BLOCK_D), tl.float32), column < DIM)
    tl.debug_barrier()  # other threads load what these stored, here and below


@triton.jit
def _sums(columns_ptr, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D], zeros from DIM on."""
    column = tl.arange(0, BLOCK_D)[None, :]
    pointer = columns_ptr + column * BLOCK + tl.arange(0, BLOCK)[:, None]
    return tl.load(pointer, column < DIM, other=0)


@triton.jit
def _query_kernel(
    dq,
    dout,
    q,
    k,
    v,
    columns_ptr,
    delta_ptr,
    row_max_ptr,
    row_sum_ptr,
    call,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK queries of one head: their delta and dq, and their part of dweight."""
    tiles = tl.cdiv(call.seqlen_q, BLOCK)
    own, head, batch = tile_of(tl.program_id(0), tiles, call.num_heads)
    query = own * BLOCK + tl.arange(0, BLOCK)
    window = window_of(call, batch)
    head_k = head // call.group
    pair = pair_of(q, k, batch, head, head_k, call)
    of_dout, of_v = _head_at(dout, batch, head), _head_at(v, batch, head_k)
    row = (batch * call.num_heads + head) * call.seqlen_q
    begin, _, _, end = key_tiles(own * BLOCK, (own + 1) * BLOCK, window, BLOCK)

    delta = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(begin, end):
        key = tile * BLOCK + tl.arange(0, BLOCK)
        p, dp = _p_and_dp(
            pair, of_dout, of_v, query, key, row_max_ptr, row_sum_ptr, row, window, None, call
        )
        delta += tl.sum(p * dp, 1)
        total += tl.sum(p, 1)
    delta = delta / tl.where(total == 0, 1.0, total)
    tl.store(delta_ptr + row + query, delta, query < call.seqlen_q)

    part = (batch * call.num_heads + head) * tiles + own
    columns_ptr += part * call.HEAD_DIM * (BLOCK + 1)
    dweight_ptr = columns_ptr + call.HEAD_DIM * BLOCK
    _clear(columns_ptr, BLOCK, call.HEAD_DIM, call.BLOCK_D)
    _clear(dweight_ptr, 1, call.HEAD_DIM, call.BLOCK_D)
    for tile in range(begin, end):
        key = tile * BLOCK + tl.arange(0, BLOCK)
        p, dp = _p_and_dp(
            pair, of_dout, of_v, query, key, row_max_ptr, row_sum_ptr, row, window, None, call
        )
        ds = p * (dp - delta[:, None])
        for c in range(call.HEAD_DIM):
            y, weight = channel(pair, query, key, window, c)
            u = weight * tl.sum(ds * (1 - y * y), 1)
            _add(columns_ptr + c * BLOCK + tl.arange(0, BLOCK), u)
            _add(dweight_ptr + c, tl.sum(tl.sum(ds * y, 1), 0))
        tl.debug_barrier()
    acc = _sums(columns_ptr, BLOCK, call.HEAD_DIM, call.BLOCK_D)
    dq_ptr = head_of(dq, batch, head, 0)
    store_rows(dq_ptr, acc, query, dq.stride_m, call.seqlen_q, call.HEAD_DIM, call.BLOCK_D)


@triton.jit
def _key_value_kernel(
    dk,
    dv,
    dout,
    q,
    k,
    v,
    columns_ptr,
    delta_ptr,
    row_max_ptr,
    row_sum_ptr,
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
    of_v = _head_at(v, batch, head_k)
    begin, _, _, end = query_tiles(own * BLOCK, window, BLOCK, BLOCK)

    part = (batch * (call.num_heads // call.group) + head_k) * tiles + own
    columns_ptr += part * (call.HEAD_DIM + HEAD_DIM_V) * BLOCK
    dv_columns_ptr = columns_ptr + call.HEAD_DIM * BLOCK
    _clear(columns_ptr, BLOCK, call.HEAD_DIM, call.BLOCK_D)
    _clear(dv_columns_ptr, BLOCK, HEAD_DIM_V, BLOCK_DV)
    row_of_tile = tl.arange(0, BLOCK)
    for i in range(call.group):
        head = head_k * call.group + i
        pair = pair_of(q, k, batch, head, head_k, call)
        row = (batch * call.num_heads + head) * call.seqlen_q
        of_dout = _head_at(dout, batch, head)
        for tile in range(begin, end):
            query = tile * BLOCK + tl.arange(0, BLOCK)
            p, dp = _p_and_dp(
                pair,
                of_dout,
                of_v,
                query,
                key,
                row_max_ptr,
                row_sum_ptr,
                row,
                window,
                dv_columns_ptr,
                call,
            )
            delta = tl.load(delta_ptr + row + query, query < call.seqlen_q, other=0)
            ds = p * (dp - delta[:, None])
            for c in range(call.HEAD_DIM):
                y, weight = channel(pair, query, key, window, c)
                u = weight * tl.sum(ds * (1 - y * y), 0)
                _add(columns_ptr + c * BLOCK + row_of_tile, u)
            tl.debug_barrier()
    acc_dk = _sums(columns_ptr, BLOCK, call.HEAD_DIM, call.BLOCK_D)
    acc_dv = _sums(dv_columns_ptr, BLOCK, HEAD_DIM_V, BLOCK_DV)
    dk_ptr, dv_ptr = head_of(dk, batch, head_k, 0), head_of(dv, batch, head_k, 0)
    store_rows(dk_ptr, acc_dk, key, dk.stride_m, call.seqlen_k, call.HEAD_DIM, call.BLOCK_D)
    store_rows(dv_ptr, acc_dv, key, dv.stride_m, call.seqlen_k, HEAD_DIM_V, BLOCK_DV)


def _query_launch(problem: Any, *strides: tuple[int, ...]) -> Launch:
    """strides: of dq, dout, q, k and v."""
    programs = problem.batch * problem.num_heads * triton.cdiv(problem.seqlen_q, BLOCK)
    return launch_of(_query_kernel, programs, problem, strides, num_stages=1)


def _key_value_launch(problem: Any, *strides: tuple[int, ...]) -> Launch:
    """strides: of dk, dv, dout, q, k and v."""
    programs = problem.batch * problem.num_heads_k * triton.cdiv(problem.seqlen_k, BLOCK)
    return launch_of(_key_value_kernel, programs, problem, strides, num_stages=1)


_launch_query, _launch_key_value = Launcher(_query_launch), Launcher(_key_value_launch)


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
    batch, num_heads, head_dim = problem.batch, problem.num_heads, problem.head_dim
    query_blocks = triton.cdiv(problem.seqlen_q, BLOCK)
    key_blocks = triton.cdiv(problem.seqlen_k, BLOCK)
    delta = torch.empty_like(row_max)
    # Each program's columns, of dq and dweight or of dk and dv.
    of_queries = row_max.new_empty(batch, num_heads, query_blocks, head_dim * (BLOCK + 1))
    of_keys = row_max.new_empty(
        batch * problem.num_heads_k * key_blocks * (head_dim + problem.head_dim_v) * BLOCK
    )
    inputs = dout, q, k, v
    rest = delta, row_max, row_sum, score_weight, key_lengths
    if of_queries.numel():
        key = problem, *strides_of(dq, *inputs)
        _launch_query(key, dq, *inputs, of_queries, *rest)
    if of_keys.numel():
        key = problem, *strides_of(dk, dv, *inputs)
        _launch_key_value(key, dk, dv, *inputs, of_keys, *rest)
    torch.sum(of_queries[..., head_dim * BLOCK :], dim=(0, 2), out=dscore_weight)
