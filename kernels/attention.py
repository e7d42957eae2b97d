"""The forward pass of attention in Triton; `leedl_fast.reference.attention` derives the formulas.

The loop over key tiles has three parts: the tiles that the left edge of the window cuts, the
interior, which runs no mask code, and the tiles that the right edge, the causal diagonal or the end
of the keys cuts. Exponentials are powers of two of score * factor; where nothing but the scale
changes a score, it is folded into the factor. fp fusion is off, and fma explicit: the sums and the
statistics have to agree on the rounding of the products.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels import attention_decode
from leedl_fast.kernels.attention_arguments import (
    Layout,
    descriptors_of,
    launch_of_tiles,
    layout_of,
    own_descriptors_of,
)
from leedl_fast.kernels.attention_blocks import Blocks, blocks_for
from leedl_fast.kernels.attention_scores import (
    head_of,
    place_of,
    rows_of,
    statistics_row,
    window_of,
)
from leedl_fast.kernels.attention_softmax import attend, normalized
from leedl_fast.kernels.attention_tiles import Matrix, key_tiles, load_own, store_own
from leedl_fast.kernels.launching import Launch, Launcher, strides_of


class Results(NamedTuple):
    """What is stored beside out: lse, and the first two of Statistics; or None each."""

    lse: Any
    base: Any
    inverse_sum: Any


class Operands(NamedTuple):
    """The tensors of a call, and descriptors of their tiles or None."""

    out: Any
    q: Any
    k: Any
    v: Any
    out_descriptor: Any
    q_descriptor: Any
    k_descriptor: Any
    v_descriptor: Any
    results: Any


@triton.jit
def _forward_tile(number, operands, call, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_M queries of one head."""
    q, k, v, out = operands.q, operands.k, operands.v, operands.out
    place = place_of(number, call, False, BLOCK_M)
    window = window_of(call, place)
    head, batch = place.head, place.batch
    query = place.first + tl.arange(0, BLOCK_M)
    end_query = tl.minimum(place.first + BLOCK_M, place.seqlen_q)
    q_ptr = head_of(q, batch, head, place.first_query)
    of_q = Matrix(q_ptr, q.stride_m, operands.q_descriptor, batch, head, place.first_query)
    head_k = head // call.group
    k_ptr = head_of(k, batch, head_k, place.first_key)
    v_ptr = head_of(v, batch, head_k, place.first_key)
    acc, row_max, row_sum = attend(
        load_own(of_q, place.first, place.seqlen_q, BLOCK_M, call.HEAD_DIM, call.BLOCK_D),
        Matrix(k_ptr, k.stride_m, operands.k_descriptor, batch, head_k, place.first_key),
        Matrix(v_ptr, v.stride_m, operands.v_descriptor, batch, head_k, place.first_key),
        rows_of(call, window, batch, place.sample, head, query[:, None]),
        window.key_end,
        key_tiles(place.first, end_query, window, BLOCK_N),
        call,
        BLOCK_M,
        BLOCK_N,
    )
    if call.NORMALIZER == "softmax":
        acc, lse, base, inverse_sum = normalized(acc, row_max * call.factor, row_sum, head, call)
        results = operands.results
        if results.lse is not None:
            row = statistics_row(call, place, head) + query
            tl.store(results.lse + row, lse, query < place.seqlen_q)
            tl.store(results.base + row, base, query < place.seqlen_q)
            tl.store(results.inverse_sum + row, inverse_sum, query < place.seqlen_q)
    if call.seed is not None:
        acc = acc * call.keep_scale
    out_ptr = head_of(out, batch, head, place.first_query)
    of_out = Matrix(out_ptr, out.stride_m, operands.out_descriptor, batch, head, place.first_query)
    store_own(of_out, acc, place.first, place.seqlen_q, BLOCK_M, call.HEAD_DIM_V, call.BLOCK_DV)


@triton.jit
def _forward_kernel(
    out,
    q,
    k,
    v,
    out_descriptor,
    q_descriptor,
    k_descriptor,
    v_descriptor,
    results,
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
        out, q, k, v, out_descriptor, q_descriptor, k_descriptor, v_descriptor, results
    )
    if IS_PERSISTENT:
        # What is the same for all tiles is made again for each: kept, it would spill.
        for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
            _forward_tile(number, operands, call, BLOCK_M, BLOCK_N)
    else:
        _forward_tile(tl.program_id(0), operands, call, BLOCK_M, BLOCK_N)


def _forward_launch(layout: Layout, blocks: Blocks, *strides: tuple[int, ...]) -> Launch:
    """strides: of out, q, k and v."""
    problem = layout.problem

    def described(out: Any, q: Any, k: Any, v: Any) -> Sequence[Any]:
        own = own_descriptors_of(problem, blocks, (out,), (q,))
        return own + descriptors_of(blocks, blocks.step, k, v)

    kernel, sizes = _forward_kernel, ("BLOCK_M", "BLOCK_N")
    of_queries = problem.num_heads, problem.seqlen_q
    return launch_of_tiles(kernel, sizes, *of_queries, layout, blocks, strides, described, Results)


_launch_forward = Launcher(_forward_launch)


def forward(
    problem: Any,
    out: Tensor,
    lse: Tensor | None,
    base: Tensor | None,
    inverse_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Tensor | None,
) -> None:
    """Fills out and, when the normalizer is softmax, lse and the statistics that `backward` takes
    unless they are None.

    problem: the Problem of leedl_fast.ops.attention_problem; others: the rest of its Inputs.
    """
    if out.numel() == 0 and (lse is None or lse.numel() == 0):
        return
    layout = layout_of(problem, *others)
    is_softmax = problem.normalizer == "softmax"
    statistics = (lse, base, inverse_sum) if is_softmax else (None, None, None)
    splits = attention_decode.splits_of(problem)
    if splits is not None:
        attention_decode.forward(layout, splits, out, statistics, q, k, v, *others)
        return
    key = layout, blocks_for("forward", problem), *strides_of(out, q, k, v)
    _launch_forward(key, out, q, k, v, *statistics, *others)
