"""The backward pass of attention in Triton; `leedl_fast.reference.attention` derives the formulas.

Deterministic, without atomics: one kernel owns tiles of dk and dv and loops over the queries that
see them, one owns tiles of dq and loops over the keys that they see, and one, in attention_bias,
owns tiles of dbias. All make the probabilities again from the scores and each row's statistics, as
the forward pass made them: p = exp2(score * factor - base) * inverse_sum.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels import attention_bias
from leedl_fast.kernels.attention_arguments import (
    Heads,
    Layout,
    Statistics,
    call_maker,
    descriptors_of,
    heads,
    layout_of,
    options_of,
    own_descriptors_of,
    statistics_of,
    tiles_of,
)
from leedl_fast.kernels.attention_blocks import Blocks, blocks_for
from leedl_fast.kernels.attention_delta import fill_delta
from leedl_fast.kernels.attention_scores import (
    head_of,
    is_kept,
    load_statistics,
    place_of,
    probability,
    product_gradient,
    rows_of,
    score,
    score_gradient,
    statistics_row,
    window_of,
)
from leedl_fast.kernels.attention_tiles import (
    Matrix,
    dot,
    key_tiles,
    load_own,
    load_rows,
    load_tile,
    query_tiles,
    store_own,
    store_rows,
)
from leedl_fast.kernels.launching import Launch, Launcher, strides_of


@triton.jit
def _add_to_dq(
    dq,
    q,
    dout,
    of_rows,
    k,
    v,
    rows,
    key_end,
    begin,
    end,
    call,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what key tiles begin .. end - 1 give to dq."""
    for tile in range(begin, end):
        first = tile * BLOCK_N
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        k_rows = load_tile(k, first, key_end, BLOCK_N, call.HEAD_DIM, call.BLOCK_D, MASKED)
        product = dot(q, tl.trans(k_rows), zeros, call.PRECISION)  # [BLOCK_M, BLOCK_N]
        key = (first + tl.arange(0, BLOCK_N))[None, :]
        scores, capped = score(product, rows, key, call, MASKED)
        p = probability(scores, of_rows, call)
        v_rows = load_tile(v, first, key_end, BLOCK_N, call.HEAD_DIM_V, call.BLOCK_DV, MASKED)
        dp = dot(dout, tl.trans(v_rows), zeros, call.PRECISION)
        kept = None
        if call.seed is not None:
            kept = is_kept(rows.query, rows, first, call, BLOCK_M, BLOCK_N)
        ds = score_gradient(p, dp, kept, of_rows, rows, call, MASKED)
        ds = product_gradient(ds, capped, call)
        dq = dot(ds.to(k_rows.dtype), k_rows, dq, call.PRECISION)  # [BLOCK_M, BLOCK_D]
    return dq


@triton.jit
def _query_kernel(
    dq,
    dout,
    q,
    k,
    v,
    dq_descriptor,
    dout_descriptor,
    q_descriptor,
    k_descriptor,
    v_descriptor,
    statistics,
    call,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns BLOCK_M queries of one head."""
    place = place_of(tl.program_id(0), call, False, BLOCK_M)
    head, batch, seqlen_q = place.head, place.batch, place.seqlen_q
    window = window_of(call, place)
    query = place.first + tl.arange(0, BLOCK_M)
    end_query = tl.minimum(place.first + BLOCK_M, seqlen_q)
    tiles = key_tiles(place.first, end_query, window, BLOCK_N)

    q_ptr = head_of(q, batch, head, place.first_query)
    of_q = Matrix(q_ptr, q.stride_m, q_descriptor, batch, head, place.first_query)
    q_rows = load_own(of_q, place.first, seqlen_q, BLOCK_M, call.HEAD_DIM, call.BLOCK_D)
    dout_ptr = head_of(dout, batch, head, place.first_query)
    of_dout = Matrix(dout_ptr, dout.stride_m, dout_descriptor, batch, head, place.first_query)
    do = load_own(of_dout, place.first, seqlen_q, BLOCK_M, call.HEAD_DIM_V, call.BLOCK_DV)
    head_k = head // call.group
    k_ptr = head_of(k, batch, head_k, place.first_key)
    v_ptr = head_of(v, batch, head_k, place.first_key)
    row = statistics_row(call, place, head) + query
    acc = tl.zeros((BLOCK_M, call.BLOCK_D), tl.float32)
    of_rows = load_statistics(statistics, row[:, None], (query < seqlen_q)[:, None], call)
    for part in tl.static_range(3):
        acc = _add_to_dq(
            acc,
            q_rows,
            do,
            of_rows,
            Matrix(k_ptr, k.stride_m, k_descriptor, batch, head_k, place.first_key),
            Matrix(v_ptr, v.stride_m, v_descriptor, batch, head_k, place.first_key),
            rows_of(call, window, batch, place.sample, head, query[:, None]),
            window.key_end,
            tiles[part],
            tiles[part + 1],
            call,
            BLOCK_M,
            BLOCK_N,
            part != 1,
        )
    dq_ptr = head_of(dq, batch, head, place.first_query)
    acc = acc * call.softmax_scale
    of_dq = Matrix(dq_ptr, dq.stride_m, dq_descriptor, batch, head, place.first_query)
    store_own(of_dq, acc, place.first, seqlen_q, BLOCK_M, call.HEAD_DIM, call.BLOCK_D)


@triton.jit
def _add_to_dk_dv(
    dk,
    dv,
    k,
    v,
    q,
    dout,
    q_descriptor,
    dout_descriptor,
    statistics,
    first_key,
    place,
    window,
    begin,
    end,
    call,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what query tiles begin .. end - 1 of a group's heads give to dk and dv: one loop over
    heads and tiles, as two would need more registers. Scores are [keys, queries] here, so that none
    is transposed.
    """
    batch, seqlen_q = place.batch, place.seqlen_q
    first_head = place.head * call.group
    first_row = statistics_row(call, place, first_head)
    q_ptr = head_of(q, batch, first_head, place.first_query)
    dout_ptr = head_of(dout, batch, first_head, place.first_query)
    key = (first_key + tl.arange(0, BLOCK_N))[:, None]
    in_group = first_head * 0
    tile = begin
    for _ in range(0, call.group * (end - begin)):
        head = first_head + in_group
        first = tile * BLOCK_M
        query = first + tl.arange(0, BLOCK_M)
        rows = rows_of(call, window, batch, place.sample, head, query[None, :])
        row = first_row + in_group * call.seqlen_q + query
        of_rows = load_statistics(statistics, row[None, :], (query < seqlen_q)[None, :], call)
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        ptr = q_ptr + in_group * q.stride_h
        of_head = Matrix(ptr, q.stride_m, q_descriptor, batch, head, place.first_query)
        q_rows = load_tile(of_head, first, seqlen_q, BLOCK_M, call.HEAD_DIM, call.BLOCK_D, MASKED)
        product = dot(k, tl.trans(q_rows), zeros, call.PRECISION)  # [BLOCK_N, BLOCK_M]
        scores, capped = score(product, rows, key, call, MASKED)
        p = probability(scores, of_rows, call)
        kept = None
        dropped = p
        if call.seed is not None:
            kept = tl.trans(is_kept(query[:, None], rows, first_key, call, BLOCK_M, BLOCK_N))
            dropped = tl.where(kept, p, 0.0)
        ptr = dout_ptr + in_group * dout.stride_h
        of_head = Matrix(ptr, dout.stride_m, dout_descriptor, batch, head, place.first_query)
        do = load_tile(of_head, first, seqlen_q, BLOCK_M, call.HEAD_DIM_V, call.BLOCK_DV, MASKED)
        dv = dot(dropped.to(do.dtype), do, dv, call.PRECISION)  # [BLOCK_N, BLOCK_DV]
        dp = dot(v, tl.trans(do), zeros, call.PRECISION)
        ds = score_gradient(p, dp, kept, of_rows, rows, call, MASKED)
        ds = product_gradient(ds, capped, call)
        dk = dot(ds.to(q_rows.dtype), q_rows, dk, call.PRECISION)  # [BLOCK_N, BLOCK_D]
        tile += 1
        in_group += (tile == end).to(tl.int64)
        tile = tl.where(tile == end, begin, tile)
    return dk, dv


@triton.jit
def _key_value_kernel(
    dk,
    dv,
    dout,
    q,
    k,
    v,
    q_descriptor,
    dout_descriptor,
    statistics,
    call,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program owns BLOCK_N keys of one head of k and v, for all query heads that read it."""
    place = place_of(tl.program_id(0), call, True, BLOCK_N)
    head, batch, key_end = place.head, place.batch, place.key_end
    window = window_of(call, place)
    key = place.first + tl.arange(0, BLOCK_N)
    tiles = query_tiles(place.first, window, BLOCK_N, BLOCK_M)

    k_ptr = head_of(k, batch, head, place.first_key)
    v_ptr = head_of(v, batch, head, place.first_key)
    k_rows = load_rows(k_ptr, key, k.stride_m, key_end, call.HEAD_DIM, call.BLOCK_D, True)
    v_rows = load_rows(v_ptr, key, v.stride_m, key_end, call.HEAD_DIM_V, call.BLOCK_DV, True)
    acc_dk = tl.zeros((BLOCK_N, call.BLOCK_D), tl.float32)
    acc_dv = tl.zeros((BLOCK_N, call.BLOCK_DV), tl.float32)
    for part in tl.static_range(3):
        acc_dk, acc_dv = _add_to_dk_dv(
            acc_dk,
            acc_dv,
            k_rows,
            v_rows,
            q,
            dout,
            q_descriptor,
            dout_descriptor,
            statistics,
            place.first,
            place,
            window,
            tiles[part],
            tiles[part + 1],
            call,
            BLOCK_N,
            BLOCK_M,
            part != 1,
        )
    acc_dk = acc_dk * call.softmax_scale
    if call.seed is not None:
        acc_dv = acc_dv * call.keep_scale
    dk_ptr = head_of(dk, batch, head, place.first_key)
    dv_ptr = head_of(dv, batch, head, place.first_key)
    seqlen_k = place.seqlen_k
    store_rows(dk_ptr, acc_dk, key, dk.stride_m, seqlen_k, call.HEAD_DIM, call.BLOCK_D)
    store_rows(dv_ptr, acc_dv, key, dv.stride_m, seqlen_k, call.HEAD_DIM_V, call.BLOCK_DV)


def _query_launch(layout: Layout, blocks: Blocks, *strides: tuple[int, ...]) -> Launch:
    """strides: of dq, dout, q, k and v."""
    problem, make_call = layout.problem, call_maker(layout)
    of_heads = [of[:3] for of in strides]
    tiles = tiles_of(problem, problem.seqlen_q, blocks.own)

    def arranged(*tensors: Any) -> tuple:
        dq, dout, q, k, v = tensors[:5]
        return (
            *(Heads(x, *of) for x, of in zip(tensors, of_heads, strict=False)),
            *own_descriptors_of(problem, blocks, (dq,), (dout, q)),
            *descriptors_of(blocks, blocks.step, k, v),
            Statistics(*tensors[5:8]),
            make_call(*tensors[8:]),
        )

    return Launch(
        _query_kernel,
        problem.batch * problem.num_heads * tiles,
        (),
        {"BLOCK_M": blocks.own, "BLOCK_N": blocks.step},
        options_of(blocks),
        arranged,
        needs_tensors=blocks.descriptors,
    )


def _key_value_launch(layout: Layout, blocks: Blocks, *strides: tuple[int, ...]) -> Launch:
    """strides: of dk, dv, dout, q, k and v."""
    problem, make_call = layout.problem, call_maker(layout)
    of_heads = [of[:3] for of in strides]
    tiles = tiles_of(problem, problem.seqlen_k, blocks.own)

    def arranged(*tensors: Any) -> tuple:
        dout, q = tensors[2:4]
        return (
            *(Heads(x, *of) for x, of in zip(tensors, of_heads, strict=False)),
            *descriptors_of(blocks, blocks.step, q, dout),
            Statistics(*tensors[6:9]),
            make_call(*tensors[9:]),
        )

    return Launch(
        _key_value_kernel,
        problem.batch * problem.num_heads_k * tiles,
        (),
        {"BLOCK_N": blocks.own, "BLOCK_M": blocks.step},
        options_of(blocks),
        arranged,
        needs_tensors=blocks.descriptors,
    )


_launch_query = Launcher(_query_launch)
_launch_key_value = Launcher(_key_value_launch)


def backward(
    problem: Any,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor,
    dsinks: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Tensor | None,
) -> None:
    """Fills the gradients; dlse and the statistics as `attention.forward` has lse and them.

    problem: the Problem of leedl_fast.ops.attention_problem; others: the rest of its Inputs, out,
    and the statistics base and inverse_sum of the forward pass.
    """
    *options, out, base, inverse_sum = others
    layout = layout_of(problem, *options)
    statistics = statistics_of(problem, base, inverse_sum)
    if statistics.delta is not None:
        fill_delta(layout, statistics, dsinks, dlse, dout, out, options)
    inputs = dout, q, k, v
    if dq.numel():
        key = layout, blocks_for("query", problem), *strides_of(dq, *inputs)
        _launch_query(key, dq, *inputs, *statistics, *options)
    if dk.numel() or dv.numel():
        key = layout, blocks_for("key_value", problem), *strides_of(dk, dv, *inputs)
        _launch_key_value(key, dk, dv, *inputs, *statistics, *options)
    if problem.wants_dbias:
        call = call_maker(layout)(*options)
        attention_bias.backward(problem, dbias, *map(heads, inputs), statistics, call)
