"""The forward pass of attention in Triton; `leedl_fast.reference.attention` derives the formulas.

The loop over key tiles has three parts: the tiles that the left edge of the window cuts, the
interior, which runs no mask code, and the tiles that the right edge, the causal diagonal or the end
of the keys cuts. Exponentials are powers of two of score * factor; where nothing but the scale
changes a score, it is folded into the factor. fp fusion is off, and fma explicit: the sums and the
statistics have to agree on the rounding of the products.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels import attention_decode
from leedl_fast.kernels.attention_arguments import call_of, descriptors_of, heads, tiles_of
from leedl_fast.kernels.attention_blocks import blocks_for
from leedl_fast.kernels.attention_scores import (
    head_of,
    place_of,
    rows_of,
    statistics_row,
    window_of,
)
from leedl_fast.kernels.attention_softmax import attend, normalized
from leedl_fast.kernels.attention_tiles import Matrix, key_tiles, load_rows, store_rows


@triton.jit
def _forward_kernel(
    out,
    lse_ptr,
    row_max_ptr,
    row_sum_ptr,
    q,
    k,
    v,
    k_descriptor,
    v_descriptor,
    call,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns BLOCK_M queries of one head."""
    place = place_of(call, False, BLOCK_M)
    window = window_of(call, place)
    head, batch = place.head, place.batch
    query = place.first + tl.arange(0, BLOCK_M)
    end_query = tl.minimum(place.first + BLOCK_M, place.seqlen_q)
    q_ptr = head_of(q, batch, head, place.first_query)
    head_k = head // call.group
    k_ptr = head_of(k, batch, head_k, place.first_key)
    v_ptr = head_of(v, batch, head_k, place.first_key)
    acc, row_max, row_sum = attend(
        load_rows(q_ptr, query, q.stride_m, place.seqlen_q, call.HEAD_DIM, call.BLOCK_D, True),
        Matrix(k_ptr, k.stride_m, k_descriptor, batch, head_k, place.first_key),
        Matrix(v_ptr, v.stride_m, v_descriptor, batch, head_k, place.first_key),
        rows_of(call, window, batch, place.sample, head, query[:, None]),
        window.key_end,
        key_tiles(place.first, end_query, window, BLOCK_N),
        call,
        BLOCK_M,
        BLOCK_N,
    )
    if call.NORMALIZER == "softmax":
        acc, base, row_sum, lse = normalized(acc, row_max * call.factor, row_sum, head, call)
        row = statistics_row(call, place, head) + query
        tl.store(lse_ptr + row, lse, query < place.seqlen_q)
        tl.store(row_max_ptr + row, base, query < place.seqlen_q)
        tl.store(row_sum_ptr + row, row_sum, query < place.seqlen_q)
    if call.seed is not None:
        acc = acc * call.keep_scale
    out_ptr = head_of(out, batch, head, place.first_query)
    store_rows(out_ptr, acc, query, out.stride_m, place.seqlen_q, call.HEAD_DIM_V, call.BLOCK_DV)


def forward(
    problem: Any,
    out: Tensor,
    lse: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Tensor | None,
) -> None:
    """Fills out and, when the normalizer is softmax, lse and the statistics that `backward` takes.

    problem: the Problem of leedl_fast.ops.attention_problem; others: the rest of its Inputs.
    """
    if out.numel() == 0 and lse.numel() == 0:
        return
    call = call_of(problem, *others)
    is_softmax = problem.normalizer == "softmax"
    statistics = (lse, row_max, row_sum) if is_softmax else (None, None, None)
    splits = attention_decode.splits_of(problem)
    if splits is not None:
        attention_decode.forward(problem, splits, out, statistics, q, k, v, call)
        return
    blocks = blocks_for("forward", problem)
    tiles = tiles_of(problem, problem.seqlen_q, blocks.own)
    _forward_kernel[(problem.batch * problem.num_heads * tiles,)](
        heads(out),
        *statistics,
        heads(q),
        heads(k),
        heads(v),
        *descriptors_of(blocks, k, v),
        call,
        BLOCK_M=blocks.own,
        BLOCK_N=blocks.step,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        enable_fp_fusion=False,
    )
