"""The gradient of attention's queries in Triton: a program owns tiles of dq, and loops over the
keys that they see.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from leedl_fast.kernels.attention_arguments import (
    Layout,
    descriptors_of,
    launch_of_tiles,
    own_descriptors_of,
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
    key_tiles,
    load_own,
    load_tile,
    store_own,
)
from leedl_fast.kernels.launching import Launch, Launcher


class Operands(NamedTuple):
    """The tensors of a call, and descriptors of their tiles or None."""

    dq: Any
    dout: Any
    q: Any
    k: Any
    v: Any
    dq_descriptor: Any
    dout_descriptor: Any
    q_descriptor: Any
    k_descriptor: Any
    v_descriptor: Any
    statistics: Any


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
def _tile(number, operands, call, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_M queries of one head."""
    dq, dout, q, k, v = operands.dq, operands.dout, operands.q, operands.k, operands.v
    place = place_of(number, call, False, BLOCK_M)
    head, batch, seqlen_q = place.head, place.batch, place.seqlen_q
    window = window_of(call, place)
    query = place.first + tl.arange(0, BLOCK_M)
    end_query = tl.minimum(place.first + BLOCK_M, seqlen_q)
    tiles = key_tiles(place.first, end_query, window, BLOCK_N)

    q_ptr = head_of(q, batch, head, place.first_query)
    of_q = Matrix(q_ptr, q.stride_m, operands.q_descriptor, batch, head, place.first_query)
    q_rows = load_own(of_q, place.first, seqlen_q, BLOCK_M, call.HEAD_DIM, call.BLOCK_D)
    dout_ptr = head_of(dout, batch, head, place.first_query)
    dout_descriptor = operands.dout_descriptor
    of_dout = Matrix(dout_ptr, dout.stride_m, dout_descriptor, batch, head, place.first_query)
    do = load_own(of_dout, place.first, seqlen_q, BLOCK_M, call.HEAD_DIM_V, call.BLOCK_DV)
    head_k = head // call.group
    k_ptr = head_of(k, batch, head_k, place.first_key)
    v_ptr = head_of(v, batch, head_k, place.first_key)
    row = statistics_row(call, place, head) + query
    acc = tl.zeros((BLOCK_M, call.BLOCK_D), tl.float32)
    exists = (query < seqlen_q)[:, None]
    of_rows = load_statistics(operands.statistics, row[:, None], exists, call)
    for part in tl.static_range(3):
        acc = _add_to_dq(
            acc,
            q_rows,
            do,
            of_rows,
            Matrix(k_ptr, k.stride_m, operands.k_descriptor, batch, head_k, place.first_key),
            Matrix(v_ptr, v.stride_m, operands.v_descriptor, batch, head_k, place.first_key),
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
    of_dq = Matrix(dq_ptr, dq.stride_m, operands.dq_descriptor, batch, head, place.first_query)
    store_own(of_dq, acc, place.first, seqlen_q, BLOCK_M, call.HEAD_DIM, call.BLOCK_D)


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
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_PERSISTENT: tl.constexpr,
):
    """One program owns one of `tiles` tiles of queries or, if IS_PERSISTENT, every n-th of them
    from its own number on, where n programs run.
    """
    operands = Operands(
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
    )
    if IS_PERSISTENT:
        # What is the same for all tiles is made again for each: kept, it would spill.
        for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
            _tile(number, operands, call, BLOCK_M, BLOCK_N)
    else:
        _tile(tl.program_id(0), operands, call, BLOCK_M, BLOCK_N)


def _launch_of(layout: Layout, blocks: Blocks, *strides: tuple[int, ...]) -> Launch:
    """strides: of dq, dout, q, k and v."""
    problem = layout.problem

    def described(dq: Any, dout: Any, q: Any, k: Any, v: Any) -> Sequence[Any]:
        own = own_descriptors_of(problem, blocks, (dq,), (dout, q))
        return own + descriptors_of(blocks, blocks.step, k, v)

    kernel, sizes = _query_kernel, ("BLOCK_M", "BLOCK_N")
    of_queries = problem.num_heads, problem.seqlen_q
    return launch_of_tiles(kernel, sizes, *of_queries, layout, blocks, strides, described)


launch = Launcher(_launch_of)
