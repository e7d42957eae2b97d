"""delta, the sum of p dp over a row, which attention's backward kernels share, and the gradient of
the sinks, which is made of it; `leedl_fast.reference.attention` derives the formulas.
"""

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
    tiles_of,
)
from leedl_fast.kernels.attention_scores import (
    LOG2_E,
    head_of,
    place_of,
    statistics_row,
    window_of,
)
from leedl_fast.kernels.attention_tiles import load_rows, sees_one_key
from leedl_fast.kernels.launching import Launch, Launcher, strides_of

_BLOCK = 32


@triton.jit
def _delta_kernel(statistics, part_dsinks_ptr, dlse_ptr, dout, out, call, BLOCK_M: tl.constexpr):
    """delta = dout . out - dlse, and what these rows give to dsinks; one program owns BLOCK_M
    queries of one head.
    """
    place = place_of(tl.program_id(0), call, False, BLOCK_M)
    head, batch, seqlen_q = place.head, place.batch, place.seqlen_q
    query = place.first + tl.arange(0, BLOCK_M)
    dout_ptr = head_of(dout, batch, head, place.first_query)
    out_ptr = head_of(out, batch, head, place.first_query)
    do = load_rows(dout_ptr, query, dout.stride_m, seqlen_q, call.HEAD_DIM_V, call.BLOCK_DV, True)
    o = load_rows(out_ptr, query, out.stride_m, seqlen_q, call.HEAD_DIM_V, call.BLOCK_DV, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if call.sinks is None:
        delta = tl.where(sees_one_key(query, window_of(call, place)), 0.0, delta)
    row = statistics_row(call, place, head) + query
    exists = query < seqlen_q
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, exists, other=0)
    tl.store(statistics.delta + row, delta, exists)
    if call.sinks is not None:
        sink = tl.load(call.sinks + head) * LOG2_E
        inverse_sum = tl.load(statistics.inverse_sum + row, exists, other=0)
        p = tl.exp2(sink - tl.load(statistics.base + row, exists, other=sink)) * inverse_sum
        tl.store(part_dsinks_ptr + tl.program_id(0), -tl.sum(p * delta))


def _delta_launch(layout: Layout, *strides: tuple[int, ...]) -> Launch:
    """strides: of dout and out."""
    problem, make_call = layout.problem, call_maker(layout)
    of_dout, of_out = (of[:3] for of in strides)
    tiles = tiles_of(problem, problem.seqlen_q, _BLOCK)

    def arranged(
        base: Any, inverse_sum: Any, delta: Any, part_dsinks: Any, dlse: Any, *others: Any
    ) -> tuple:
        dout, out, *options = others
        return (
            Statistics(base, inverse_sum, delta),
            part_dsinks,
            dlse,
            Heads(dout, *of_dout),
            Heads(out, *of_out),
            make_call(*options),
        )

    return Launch(
        _delta_kernel,
        problem.batch * problem.num_heads * tiles,
        (),
        {"BLOCK_M": _BLOCK},
        {"num_warps": 4, "enable_fp_fusion": False},
        arranged,
    )


_launch = Launcher(_delta_launch)


def fill_delta(
    layout: Layout,
    statistics: Statistics,
    dsinks: Tensor,
    dlse: Tensor | None,
    dout: Tensor,
    out: Tensor,
    options: Sequence[Tensor | None],
) -> None:
    """options: the Inputs after v, as everywhere."""
    problem = layout.problem
    part_dsinks = None
    if problem.has_sinks:
        tiles = tiles_of(problem, problem.seqlen_q, _BLOCK)
        part_dsinks = dsinks.new_empty(problem.batch, problem.num_heads, tiles)
    if statistics.delta.numel():
        key = layout, *strides_of(dout, out)
        _launch(key, *statistics, part_dsinks, dlse, dout, out, *options)
    if part_dsinks is not None:
        torch.sum(part_dsinks, (0, 2), out=dsinks)
