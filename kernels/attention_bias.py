"""The gradient of attention's bias in Triton: a fixed order of additions, and no atomics."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels.attention_arguments import (
    Heads,
    Layout,
    Statistics,
    call_maker,
    options_of,
)
from leedl_fast.kernels.attention_blocks import Blocks, blocks_for
from leedl_fast.kernels.attention_scores import (
    head_of,
    is_kept,
    load_statistics,
    probability,
    rows_of,
    score,
    score_gradient,
)
from leedl_fast.kernels.attention_tiles import (
    Window,
    dot,
    key_end_of,
    key_tiles,
    load_rows,
    tile_of,
)
from leedl_fast.kernels.launching import Launch, Launcher, strides_of


@triton.jit
def _bias_kernel(
    dbias_ptr,
    dout,
    q,
    k,
    v,
    statistics,
    call,
    bias_heads,
    samples,
    heads,
    OF_QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns a tile of queries and keys of one head of the bias, and adds up `samples`
    samples and `heads` heads that share it. dbias is (batch, heads, rows, seqlen_k) of the bias,
    with a row for each query, or for each tile of queries unless OF_QUERIES.
    """
    tiles_n = tl.cdiv(call.seqlen_k, BLOCK_N)
    tiles_m = tl.cdiv(call.seqlen_q, BLOCK_M)
    tile, bias_head, bias_batch = tile_of(tl.program_id(0), tiles_m * tiles_n, bias_heads)
    tile_m, tile_n = tile // tiles_n, tile % tiles_n
    first = tile_m * BLOCK_M
    first_key = tile_n * BLOCK_N
    query = first + tl.arange(0, BLOCK_M)
    key = first_key + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, samples * heads):
        batch = bias_batch + i // heads
        head = bias_head + i % heads
        window = Window(
            call.seqlen_k - call.seqlen_q,
            call.window_left,
            call.window_right,
            call.seqlen_q,
            key_end_of(call.key_lengths, batch, call.seqlen_k),
        )
        end_query = tl.minimum(first + BLOCK_M, call.seqlen_q)
        begin, _, _, end = key_tiles(first, end_query, window, BLOCK_N)
        if (tile_n >= begin) & (tile_n < end):
            acc += _tile_gradient(
                dout,
                q,
                k,
                v,
                statistics,
                batch,
                head,
                query,
                key,
                first_key,
                window,
                call,
                BLOCK_M,
                BLOCK_N,
            )
    in_keys = key < call.seqlen_k
    row = (bias_batch * bias_heads + bias_head) * (call.seqlen_q if OF_QUERIES else tiles_m)
    if OF_QUERIES:
        pointer = dbias_ptr + (row + query)[:, None] * call.seqlen_k + key[None, :]
        tl.store(pointer, acc, (query < call.seqlen_q)[:, None] & in_keys[None, :])
    else:
        tl.store(dbias_ptr + (row + tile_m) * call.seqlen_k + key, tl.sum(acc, 0), in_keys)


@triton.jit
def _tile_gradient(
    dout,
    q,
    k,
    v,
    statistics,
    batch,
    head,
    query,
    key,
    first_key,
    window,
    call,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of the scores of one tile."""
    seqlen_q, key_end = call.seqlen_q, window.key_end
    head_k = head // call.group
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    q_ptr, k_ptr = head_of(q, batch, head, 0), head_of(k, batch, head_k, 0)
    q_rows = load_rows(q_ptr, query, q.stride_m, seqlen_q, call.HEAD_DIM, call.BLOCK_D, True)
    k_rows = load_rows(k_ptr, key, k.stride_m, key_end, call.HEAD_DIM, call.BLOCK_D, True)
    product = dot(q_rows, tl.trans(k_rows), zeros, call.PRECISION)
    rows = rows_of(call, window, batch, batch, head, query[:, None])
    row = (batch * call.num_heads + head) * seqlen_q + query
    of_rows = load_statistics(statistics, row[:, None], (query < seqlen_q)[:, None], call)
    scores, _ = score(product, rows, key[None, :], call, True)
    p = probability(scores, of_rows, call)
    dout_ptr, v_ptr = head_of(dout, batch, head, 0), head_of(v, batch, head_k, 0)
    do = load_rows(dout_ptr, query, dout.stride_m, seqlen_q, call.HEAD_DIM_V, call.BLOCK_DV, True)
    v_rows = load_rows(v_ptr, key, v.stride_m, key_end, call.HEAD_DIM_V, call.BLOCK_DV, True)
    dp = dot(do, tl.trans(v_rows), zeros, call.PRECISION)
    kept = None
    if call.seed is not None:
        kept = is_kept(rows.query, rows, first_key, call, BLOCK_M, BLOCK_N)
    return score_gradient(p, dp, kept, of_rows, rows, call, True)


def _tiles_of(problem: Any, blocks: Blocks) -> tuple[int, int]:
    """How many tiles there are of queries, and of keys."""
    return -(-problem.seqlen_q // blocks.own), -(-problem.seqlen_k // blocks.step)


def _bias_launch(layout: Layout, blocks: Blocks, *strides: tuple[int, ...]) -> Launch:
    """strides: of dout, q, k and v."""
    problem, make_call = layout.problem, call_maker(layout)
    of_heads = [of[:3] for of in strides]
    bias_batch, bias_heads, bias_queries, _ = problem.bias_shape
    tiles_m, tiles_n = _tiles_of(problem, blocks)

    def arranged(dbias: Any, *tensors: Any) -> tuple:
        return (
            dbias,
            *(Heads(x, *of) for x, of in zip(tensors, of_heads, strict=False)),
            Statistics(*tensors[4:7]),
            make_call(*tensors[7:]),
        )

    return Launch(
        _bias_kernel,
        bias_batch * bias_heads * tiles_m * tiles_n,
        (
            bias_heads,
            problem.batch if bias_batch == 1 else 1,
            problem.num_heads if bias_heads == 1 else 1,
        ),
        {
            "OF_QUERIES": bias_queries == problem.seqlen_q,
            "BLOCK_M": blocks.own,
            "BLOCK_N": blocks.step,
        },
        options_of(blocks),
        arranged,
    )


_launch = Launcher(_bias_launch)


def backward(
    layout: Layout,
    dbias: Tensor,
    inputs: tuple[Tensor, ...],
    statistics: Statistics,
    options: Sequence[Tensor | None],
) -> None:
    """dbias: float32 and contiguous, in the bias' shape; inputs: dout, q, k and v; the rest as in
    attention_delta.
    """
    problem = layout.problem
    bias_batch, bias_heads, bias_queries, _ = problem.bias_shape
    blocks = blocks_for("bias", problem)
    of_queries = bias_queries == problem.seqlen_q
    parts = dbias
    if not of_queries:
        tiles, _ = _tiles_of(problem, blocks)
        parts = dbias.new_empty(bias_batch, bias_heads, tiles, problem.seqlen_k)
    if parts.numel():
        _launch((layout, blocks, *strides_of(*inputs)), parts, *inputs, *statistics, *options)
    if not of_queries:
        torch.sum(parts, 2, keepdim=True, out=dbias)
