"""Additive attention in Triton, forward, and what the backward shares with it;
`leedl_fast.reference.additive_attention` derives the formulas.

Scores are summed channel by channel, so that no (seqlen_q, seqlen_k, head_dim) tensor is made.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels.attention_arguments import Heads
from leedl_fast.kernels.attention_scores import head_of
from leedl_fast.kernels.attention_tiles import (
    Window,
    key_end_of,
    key_tiles,
    load_rows,
    padded,
    store_rows,
    tile_of,
)
from leedl_fast.kernels.launching import Launch, Launcher, strides_of

BLOCK = 16  # queries and keys of a tile: larger ones spill in IEEE float32 products


class Call(NamedTuple):
    """What one call hands to each of its kernels. Fields in capitals are constants."""

    score_weight: Any
    key_lengths: Any
    num_heads: Any
    group: Any
    seqlen_q: Any
    seqlen_k: Any
    window_left: Any
    window_right: Any
    HEAD_DIM: Any
    HEAD_DIM_V: Any
    BLOCK_D: Any
    BLOCK_DV: Any


class Pair(NamedTuple):
    """A head of q, the head of k that it reads, and its score_weight: the first of each, and the
    strides of rows.
    """

    q_ptr: Any
    q_stride: Any
    k_ptr: Any
    k_stride: Any
    weight_ptr: Any


@triton.jit
def pair_of(q, k, batch, head, head_k, call):
    return Pair(
        head_of(q, batch, head, 0),
        q.stride_m,
        head_of(k, batch, head_k, 0),
        k.stride_m,
        call.score_weight + head * call.HEAD_DIM,
    )


@triton.jit
def window_of(call, batch):
    key_end = key_end_of(call.key_lengths, batch, call.seqlen_k)
    shift = call.seqlen_k - call.seqlen_q
    return Window(shift, call.window_left, call.window_right, call.seqlen_q, key_end)


@triton.jit
def _tanh(x):
    """Infinite x included; NaN where x is."""
    t = tl.exp(-2 * tl.abs(x))
    y = (1 - t) / (1 + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def channel(pair, query, key, window, c):
    """(tanh(q_i + k_j) of channel c, [queries, keys], and the channel's weight), float32."""
    q_ptr = pair.q_ptr + query.to(tl.int64) * pair.q_stride + c
    k_ptr = pair.k_ptr + key.to(tl.int64) * pair.k_stride + c
    q = tl.load(q_ptr, query < window.seqlen_q, other=0).to(tl.float32)
    k = tl.load(k_ptr, key < window.key_end, other=0).to(tl.float32)
    return _tanh(q[:, None] + k[None, :]), tl.load(pair.weight_ptr + c).to(tl.float32)


@triton.jit
def visible_scores(pair, query, key, window, HEAD_DIM):
    """[queries, keys]; -inf where a key is hidden from a query, or either does not exist."""
    scores = tl.zeros((query.shape[0], key.shape[0]), tl.float32)
    for c in range(HEAD_DIM):
        y, weight = channel(pair, query, key, window, c)
        scores += weight * y
    position = query[:, None] + window.shift
    inside = key[None, :] >= position - window.window_left
    inside = inside & (key[None, :] <= position + window.window_right)
    exists = (query < window.seqlen_q)[:, None] & (key < window.key_end)[None, :]
    return tl.where(inside & exists, scores, -float("inf"))


@triton.jit
def float32_rows(x, batch, head, row, row_end, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows of one head of x, [rows, BLOCK_DIM]; zeros from DIM and row_end on."""
    rows = load_rows(head_of(x, batch, head, 0), row, x.stride_m, row_end, DIM, BLOCK_DIM, True)
    return rows.to(tl.float32)


@triton.jit
def _forward_kernel(out, q, k, v, row_max_ptr, row_sum_ptr, call, BLOCK: tl.constexpr):
    """One program owns BLOCK queries of one head."""
    tile, head, batch = tile_of(tl.program_id(0), tl.cdiv(call.seqlen_q, BLOCK), call.num_heads)
    first = tile * BLOCK
    query = first + tl.arange(0, BLOCK)
    window = window_of(call, batch)
    head_k = head // call.group
    pair = pair_of(q, k, batch, head, head_k, call)
    begin, _, _, end = key_tiles(first, first + BLOCK, window, BLOCK)

    row_max = tl.full((BLOCK,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, call.BLOCK_DV), tl.float32)
    for tile in range(begin, end):
        key = tile * BLOCK + tl.arange(0, BLOCK)
        scores = visible_scores(pair, query, key, window, call.HEAD_DIM)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        offset = tl.where(new_max == -float("inf"), 0.0, new_max)  # -inf - -inf would be NaN
        rescale = tl.exp(row_max - offset)
        p = tl.exp(scores - offset[:, None])
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v_rows = float32_rows(v, batch, head_k, key, window.key_end, call.HEAD_DIM_V, call.BLOCK_DV)
        acc = tl.dot(p, v_rows, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max

    is_masked = row_sum == 0
    row_sum = tl.where(is_masked, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    out_ptr = head_of(out, batch, head, 0)
    store_rows(out_ptr, acc, query, out.stride_m, call.seqlen_q, call.HEAD_DIM_V, call.BLOCK_DV)
    if row_max_ptr is not None:
        row = (batch * call.num_heads + head) * call.seqlen_q + query
        row_max = tl.where(is_masked, float("inf"), row_max)
        tl.store(row_max_ptr + row, row_max, query < call.seqlen_q)
        tl.store(row_sum_ptr + row, row_sum, query < call.seqlen_q)


def call_maker(problem: Any) -> Callable[[Any, Any], Call]:
    """make(score_weight, key_lengths) -> Call, of tensors or addresses. problem: the Problem of
    leedl_fast.ops.additive_attention.
    """
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    sizes = (
        problem.num_heads,
        problem.num_heads // max(problem.num_heads_k, 1),
        problem.seqlen_q,
        problem.seqlen_k,
        problem.window_left,
        problem.window_right,
        *map(tl.constexpr, (head_dim, head_dim_v, padded(head_dim), padded(head_dim_v))),
    )
    return lambda score_weight, key_lengths: Call(score_weight, key_lengths, *sizes)


def warps_of(problem: Any) -> int:
    """So many that whole rows of a tile fit registers."""
    return 4 if padded(max(problem.head_dim, problem.head_dim_v)) <= 256 else 8


def launch_of(
    kernel: Any, programs: int, problem: Any, strides: tuple[tuple[int, ...], ...], **options: Any
) -> Launch:
    """The kernel's tensors are those of `strides`, then others as they are, then score_weight and
    key_lengths. options: the compiler's, beside those of all.
    """
    make_call = call_maker(problem)
    of_heads = [of[:3] for of in strides]

    def arranged(*tensors: Any) -> tuple:
        return (
            *(Heads(x, *of) for x, of in zip(tensors, of_heads, strict=False)),
            *tensors[len(of_heads) : -2],
            make_call(*tensors[-2:]),
        )

    options = {"num_warps": warps_of(problem), "enable_fp_fusion": True, **options}
    return Launch(kernel, programs, (), {"BLOCK": BLOCK}, options, arranged)


def _forward_launch(problem: Any, *strides: tuple[int, ...]) -> Launch:
    """strides: of out, q, k and v."""
    programs = problem.batch * problem.num_heads * triton.cdiv(problem.seqlen_q, BLOCK)
    return launch_of(_forward_kernel, programs, problem, strides)


_launch_forward = Launcher(_forward_launch)


def forward(
    problem: Any,
    out: Tensor,
    row_max: Tensor | None,
    row_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_weight: Tensor,
    key_lengths: Tensor | None,
) -> None:
    """Fills out, and the statistics that `additive_attention_backward.backward` takes unless they
    are None.
    """
    if problem.batch * problem.num_heads * problem.seqlen_q > 0:
        key = problem, *strides_of(out, q, k, v)
        _launch_forward(key, out, q, k, v, row_max, row_sum, score_weight, key_lengths)
