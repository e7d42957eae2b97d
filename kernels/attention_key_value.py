"""The gradients of attention's keys and values in Triton: a program owns tiles of dk and dv, and
loops over the queries that see them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from leedl_fast.kernels.attention_arguments import (
    Layout,
    descriptors_of,
    launch_of_tiles,
)
from leedl_fast.kernels.attention_blocks import Blocks
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
    load_rows,
    load_tile,
    query_tiles,
    store_rows,
)
from leedl_fast.kernels.launching import Launch, Launcher


class Operands(NamedTuple):
    """The tensors of a call, and descriptors of their tiles or None."""

    dk: Any
    dv: Any
    dout: Any
    q: Any
    k: Any
    v: Any
    q_descriptor: Any
    dout_descriptor: Any
    statistics: Any


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
def _tile(number, operands, call, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """BLOCK_N keys of one head of k and v, for all query heads that read it."""
    dk, dv, k, v = operands.dk, operands.dv, operands.k, operands.v
    place = place_of(number, call, True, BLOCK_N)
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
            operands.q,
            operands.dout,
            operands.q_descriptor,
            operands.dout_descriptor,
            operands.statistics,
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
    tiles,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IS_PERSISTENT: tl.constexpr,
):
    """One program owns one of `tiles` tiles of keys or, if IS_PERSISTENT, every n-th of them from
    its own number on, where n programs run.
    """
    operands = Operands(dk, dv, dout, q, k, v, q_descriptor, dout_descriptor, statistics)
    if IS_PERSISTENT:
        # What is the same for all tiles is made again for each: kept, it would spill.
        for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
            _tile(number, operands, call, BLOCK_N, BLOCK_M)
    else:
        _tile(tl.program_id(0), operands, call, BLOCK_N, BLOCK_M)


def _launch_of(layout: Layout, blocks: Blocks, *strides: tuple[int, ...]) -> Launch:
    """strides: of dk, dv, dout, q, k and v."""
    problem = layout.problem

    def described(dk: Any, dv: Any, dout: Any, q: Any, k: Any, v: Any) -> Sequence[Any]:
        return descriptors_of(blocks, blocks.step, q, dout)

    kernel, sizes = _key_value_kernel, ("BLOCK_N", "BLOCK_M")
    of_keys = problem.num_heads_k, problem.seqlen_k
    return launch_of_tiles(kernel, sizes, *of_keys, layout, blocks, strides, described)


launch = Launcher(_launch_of)
