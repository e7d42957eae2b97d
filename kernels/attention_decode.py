"""Attention of few queries to many keys (decoding with a cache of keys and values) in Triton: the
keys are split among programs, whose parts a second kernel adds up (flash-decoding, Dao et al.
2023).

A split is a fixed range of keys, so that a sample's result does not depend on its batch.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels.attention_arguments import (
    Heads,
    Layout,
    call_maker,
    descriptors_of,
    options_of,
)
from leedl_fast.kernels.attention_blocks import Blocks, blocks_for
from leedl_fast.kernels.attention_scores import head_of, rows_of
from leedl_fast.kernels.attention_softmax import attend, normalized
from leedl_fast.kernels.attention_tiles import (
    Matrix,
    Window,
    key_end_of,
    key_tiles,
    load_rows,
    padded,
    store_rows,
    tile_of,
)
from leedl_fast.kernels.launching import Launch, Launcher, strides_of

MAX_ROWS = 64  # queries of all heads that share keys; more of them fill a tile of their own
_COMBINED = 16  # splits that the second kernel loads at a time


class Splits(NamedTuple):
    """Splits number first .. first + count - 1 of the keys hold all that any query sees."""

    first: int
    count: int


def splits_of(problem: Any) -> Splits | None:
    """None where whole rows are as good: many queries, few keys, packed sequences."""
    group = problem.num_heads // max(problem.num_heads_k, 1)
    if problem.num_sequences is not None or group * problem.seqlen_q > MAX_ROWS:
        return None
    size = blocks_for("decode", problem).own
    first = max(problem.seqlen_k - problem.seqlen_q - problem.window_left, 0) // size
    count = -(-problem.seqlen_k // size) - first
    return Splits(first, count) if count > 1 else None


@triton.jit
def _statistics_of(parts_ptr, num_parts, call):
    """(row_max, row_sum) of the parts, behind their acc: one allocation holds all three."""
    row_max_ptr = parts_ptr + tl.full((), call.BLOCK_DV, tl.int64) * num_parts
    return row_max_ptr, row_max_ptr + num_parts


@triton.jit
def _split_kernel(
    parts_ptr,
    q,
    k,
    v,
    k_descriptor,
    v_descriptor,
    call,
    num_parts,
    first_split,
    num_splits,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns SPLIT keys of one head of k and v, for every query that reads them. Parts
    are (batch, num_heads, seqlen_q, splits), num_parts of them.
    """
    split, head_k, batch = tile_of(tl.program_id(0), num_splits, call.num_heads // call.group)
    row = tl.arange(0, BLOCK_M)
    exists = row < call.group * call.seqlen_q
    head = head_k * call.group + tl.where(exists, row // call.seqlen_q, 0)
    query = tl.where(exists, row % call.seqlen_q, call.seqlen_q)
    window = Window(
        call.seqlen_k - call.seqlen_q,
        call.window_left,
        call.window_right,
        call.seqlen_q,
        key_end_of(call.key_lengths, batch, call.seqlen_k),
    )
    TILES: tl.constexpr = SPLIT // BLOCK_N
    low = (first_split + split) * TILES
    high = low + TILES
    begin, inner_begin, inner_end, end = key_tiles(0, call.seqlen_q, window, BLOCK_N)
    q_ptr = q.ptr + batch * q.stride_b + (head * q.stride_h)[:, None]
    acc, row_max, row_sum = attend(
        load_rows(q_ptr, query, q.stride_m, call.seqlen_q, call.HEAD_DIM, call.BLOCK_D, True),
        Matrix(head_of(k, batch, head_k, 0), k.stride_m, k_descriptor, batch, head_k, 0),
        Matrix(head_of(v, batch, head_k, 0), v.stride_m, v_descriptor, batch, head_k, 0),
        rows_of(call, window, batch, batch, head[:, None], query[:, None]),
        window.key_end,
        (
            tl.minimum(tl.maximum(begin, low), high),
            tl.minimum(tl.maximum(inner_begin, low), high),
            tl.minimum(tl.maximum(inner_end, low), high),
            tl.minimum(tl.maximum(end, low), high),
        ),
        call,
        BLOCK_M,
        BLOCK_N,
    )
    part = ((batch * call.num_heads + head) * call.seqlen_q + query) * num_splits + split
    column = tl.arange(0, call.BLOCK_DV)
    pointer = parts_ptr + part[:, None] * call.BLOCK_DV + column[None, :]
    tl.store(pointer, acc, exists[:, None] & (column < call.BLOCK_DV)[None, :])
    if call.NORMALIZER == "softmax":
        row_max_ptr, row_sum_ptr = _statistics_of(parts_ptr, num_parts, call)
        tl.store(row_max_ptr + part, row_max * call.factor, exists)
        tl.store(row_sum_ptr + part, row_sum, exists)


@triton.jit
def _combine_kernel(
    out,
    lse_ptr,
    base_ptr,
    inverse_sum_ptr,
    parts_ptr,
    call,
    num_parts,
    num_splits,
    BLOCK: tl.constexpr,
):
    """One program owns one query of one head, and adds up its parts, BLOCK at a time."""
    query, head, batch = tile_of(tl.program_id(0), call.seqlen_q, call.num_heads)
    row = (batch * call.num_heads + head) * call.seqlen_q + query
    first = row * num_splits
    row_max_ptr, row_sum_ptr = _statistics_of(parts_ptr, num_parts, call)
    column = tl.arange(0, call.BLOCK_DV)
    base = tl.full((1,), float("-inf"), tl.float32)
    if call.NORMALIZER == "softmax":
        for begin in range(0, num_splits, BLOCK):
            split = begin + tl.arange(0, BLOCK)
            part = tl.load(row_max_ptr + first + split, split < num_splits, other=float("-inf"))
            base = tl.maximum(base, tl.max(part, 0))
    offset = tl.where(base == float("-inf"), 0.0, base)
    acc = tl.zeros((1, call.BLOCK_DV), tl.float32)
    row_sum = tl.zeros((1,), tl.float32)
    for begin in range(0, num_splits, BLOCK):
        split = begin + tl.arange(0, BLOCK)
        exists = split < num_splits
        pointer = parts_ptr + (first + split)[:, None] * call.BLOCK_DV + column[None, :]
        part = tl.load(pointer, exists[:, None], other=0)  # [BLOCK, BLOCK_DV]
        if call.NORMALIZER == "softmax":
            part_max = tl.load(row_max_ptr + first + split, exists, other=float("-inf"))
            weight = tl.exp2(part_max - offset)
            part_sum = tl.load(row_sum_ptr + first + split, exists, other=0)
            row_sum += tl.sum(part_sum * weight, 0)
            part = part * weight[:, None]
        acc += tl.sum(part, 0)[None, :]
    if call.NORMALIZER == "softmax":
        acc, lse, base, inverse_sum = normalized(acc, base, row_sum, head, call)
        if lse_ptr is not None:
            one = tl.arange(0, 1)
            tl.store(lse_ptr + row + one, lse)
            tl.store(base_ptr + row + one, base)
            tl.store(inverse_sum_ptr + row + one, inverse_sum)
    if call.seed is not None:
        acc = acc * call.keep_scale
    out_ptr = head_of(out, batch, head, 0)
    rows = query + tl.arange(0, 1)
    store_rows(out_ptr, acc, rows, out.stride_m, call.seqlen_q, call.HEAD_DIM_V, call.BLOCK_DV)


def _num_parts(problem: Any, splits: Splits) -> int:
    return problem.batch * problem.num_heads * problem.seqlen_q * splits.count


def _split_launch(
    layout: Layout, blocks: Blocks, splits: Splits, *strides: tuple[int, ...]
) -> Launch:
    """strides: of q, k and v."""
    problem, make_call = layout.problem, call_maker(layout)
    of_q, of_k, of_v = (of[:3] for of in strides)
    queries = problem.num_heads // problem.num_heads_k * problem.seqlen_q

    def arranged(parts: Any, q: Any, k: Any, v: Any, *others: Any) -> tuple:
        return (
            parts,
            Heads(q, *of_q),
            Heads(k, *of_k),
            Heads(v, *of_v),
            *descriptors_of(blocks, blocks.step, k, v),
            make_call(*others),
        )

    return Launch(
        _split_kernel,
        problem.batch * problem.num_heads_k * splits.count,
        (_num_parts(problem, splits), splits.first, splits.count),
        {
            "SPLIT": blocks.own,
            "BLOCK_M": max(16, triton.next_power_of_2(queries)),
            "BLOCK_N": blocks.step,
        },
        options_of(blocks),
        arranged,
        needs_tensors=blocks.descriptors,
    )


def _combine_launch(
    layout: Layout, blocks: Blocks, splits: Splits, of_out: tuple[int, ...]
) -> Launch:
    """of_out: out's strides."""
    problem, make_call = layout.problem, call_maker(layout)

    def arranged(
        out: Any, lse: Any, base: Any, inverse_sum: Any, parts: Any, *others: Any
    ) -> tuple:
        return Heads(out, *of_out[:3]), lse, base, inverse_sum, parts, make_call(*others)

    return Launch(
        _combine_kernel,
        _num_parts(problem, splits) // splits.count,
        (_num_parts(problem, splits), splits.count),
        {"BLOCK": _COMBINED},
        {"num_warps": blocks.num_warps, "enable_fp_fusion": False},
        arranged,
    )


_launch_split, _launch_combine = Launcher(_split_launch), Launcher(_combine_launch)


def forward(
    layout: Layout,
    splits: Splits,
    out: Tensor,
    statistics: tuple[Tensor | None, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Tensor | None,
) -> None:
    """Like `attention.forward`; statistics: lse, base, inverse_sum, or None each."""
    problem = layout.problem
    blocks = blocks_for("decode", problem)
    size = _num_parts(problem, splits) * (padded(problem.head_dim_v) + 2)
    parts = torch.empty(size, dtype=torch.float32, device=problem.device)
    key = layout, blocks, splits
    _launch_split((*key, *strides_of(q, k, v)), parts, q, k, v, *others)
    _launch_combine((*key, *strides_of(out)), out, *statistics, parts, *others)
