"""What one call of attention hands to each of its kernels, listed once for all of them.

A field that is None costs nothing: what would read it is not compiled.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from leedl_fast.kernels.attention_blocks import Blocks, programs_for
from leedl_fast.kernels.attention_tiles import padded, precision
from leedl_fast.kernels.launching import Launch


class Heads(NamedTuple):
    """A (batch, num_heads, rows, columns) tensor with a contiguous last dimension."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any


class Statistics(NamedTuple):
    """(batch, num_heads, seqlen_q) float32 tensors, all None unless the normalizer is softmax.

    base: of the row's powers of two: its largest exponent, the sink's included.
    inverse_sum: 1 / the sum of these powers relative to the base.
    Both are 0 where the row sees nothing, so that the backward pass has no case to tell apart.
    """

    base: Any
    inverse_sum: Any
    delta: Any


class Call(NamedTuple):
    """Sizes, options and the smaller tensors.

    A score is q . k, times `score_scale` unless that is None, then changed by softcap, bias and
    slopes; score * factor is the exponent of a power of two. Fields in capitals are constants.
    """

    num_heads: Any
    group: Any
    seqlen_q: Any
    seqlen_k: Any
    window_left: Any
    window_right: Any
    softmax_scale: Any
    factor: Any
    score_scale: Any
    softcap: Any
    bias: Heads | None
    sinks: Any
    alibi_slopes: Any
    alibi_stride_b: Any
    key_lengths: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    num_sequences: Any
    seed: Any
    drop_below: Any
    keep_scale: Any
    NORMALIZER: Any
    HEAD_DIM: Any
    HEAD_DIM_V: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    PRECISION: Any


class Layout(NamedTuple):
    """What decides a Call but for the tensors, or their addresses, in it.

    bias_strides: 0 along what is broadcast, None without a bias. slopes_dim: alibi_slopes' number
    of dimensions. dtypes: of the tensors.
    """

    problem: Any
    precision: str
    bias_strides: tuple[int, ...] | None
    slopes_dim: int | None
    dtypes: tuple[torch.dtype | None, ...]


def layout_of(
    problem: Any,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    *others: Tensor | None,
) -> Layout:
    """problem: the Problem of leedl_fast.ops.attention_problem; the tensors, its Inputs after v."""
    return Layout(
        problem,
        precision(problem.dtype, problem.device),
        None if bias is None else _broadcast(bias),
        None if alibi_slopes is None else alibi_slopes.dim(),
        tuple([None if x is None else x.dtype for x in (bias, sinks, alibi_slopes, *others)]),
    )


@lru_cache(maxsize=256)
def call_maker(layout: Layout) -> Callable[..., Call]:
    """make(bias, sinks, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, seed) -> Call."""
    problem = layout.problem
    scale, softcap = problem.softmax_scale, problem.softcap
    # A positive scale alone is folded into the exponents' factor.
    is_folded = problem.normalizer == "softmax" and scale > 0
    is_folded &= softcap is None and layout.bias_strides is None and layout.slopes_dim is None
    score_scale = scale if softcap is None else scale / softcap
    log2_e = math.log2(math.e)
    sizes = (
        problem.num_heads,
        problem.num_heads // max(problem.num_heads_k, 1),
        problem.seqlen_q,
        problem.seqlen_k,
        problem.window_left,
        problem.window_right,
        scale,
        scale * log2_e if is_folded else log2_e,
        None if is_folded else score_scale,
        softcap,
    )
    slopes_stride = problem.num_heads if layout.slopes_dim == 2 else 0
    dropout = int(problem.dropout_p * 2**32), 1 / (1 - problem.dropout_p)
    constants = (
        problem.normalizer,
        problem.head_dim,
        problem.head_dim_v,
        padded(problem.head_dim),
        padded(problem.head_dim_v),
        layout.precision,
    )
    last = (*dropout, *map(tl.constexpr, constants))

    def make(
        bias: Any,
        sinks: Any,
        alibi_slopes: Any,
        key_lengths: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        seed: Any,
    ) -> Call:
        return Call(
            *sizes,
            None if layout.bias_strides is None else Heads(bias, *layout.bias_strides),
            sinks,
            alibi_slopes,
            slopes_stride,
            key_lengths,
            cu_seqlens_q,
            cu_seqlens_k,
            problem.num_sequences,
            seed,
            *last,
        )

    return make


def _broadcast(bias: Tensor) -> tuple[int, ...]:
    strides = zip(bias.stride()[:3], bias.shape[:3], strict=True)
    return tuple([stride if size > 1 else 0 for stride, size in strides])


def own_descriptors_of(
    problem: Any, blocks: Blocks, outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
) -> list[TensorDescriptor | None]:
    """Of the tiles that a program owns. A packed sequence's last tile is no whole one, and must not
    be stored as one.
    """
    of_inputs = descriptors_of(blocks, blocks.own, *inputs)
    if problem.num_sequences is not None:
        return [None] * len(outputs) + of_inputs
    return descriptors_of(blocks, blocks.own, *outputs) + of_inputs


def descriptors_of(blocks: Blocks, rows: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """Of tiles of so many rows of one head; all None where blocks asks for none, or a tensor is
    not made for them: they take addresses and strides in multiples of 16 bytes, and no empty or
    repeated dimension.
    """
    if not (blocks.descriptors and all(map(_is_describable, tensors))):
        return [None] * len(tensors)
    return [
        TensorDescriptor(x, x.shape, x.stride(), [1, 1, rows, padded(x.shape[3])]) for x in tensors
    ]


def _is_describable(x: Tensor) -> bool:
    bytes_apart = [stride * x.element_size() for stride in x.stride()[:3]]
    return (
        x.data_ptr() % 16 == 0
        and all(bytes % 16 == 0 for bytes in bytes_apart)
        and all(bytes_apart)
        and x.numel() > 0
    )


def statistics_of(problem: Any, base: Tensor, inverse_sum: Tensor) -> Statistics:
    """With room for delta."""
    if problem.normalizer != "softmax":
        return Statistics(None, None, None)
    return Statistics(base, inverse_sum, torch.empty_like(base))


def options_of(blocks: Blocks) -> dict[str, Any]:
    """The compiler's."""
    return {
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        "enable_fp_fusion": False,
    }


def tiles_of(problem: Any, seqlen: int, block: int) -> int:
    """How many tiles of `block` rows the programs of one head count, packed or not; where sequences
    are packed some are empty (see attention_tiles.tile_in_pack).
    """
    if problem.num_sequences is None:
        return -(-seqlen // block)
    return seqlen // block + problem.num_sequences


def launch_of_tiles(
    kernel: Any,
    sizes: tuple[str, str],
    num_heads: int,
    seqlen: int,
    layout: Layout,
    blocks: Blocks,
    strides: tuple[tuple[int, ...], ...],
    described: Callable[..., Sequence[Any]],
    statistics: type = Statistics,
) -> Launch:
    """One program for each tile of `seqlen` rows of num_heads heads, or as many as blocks says.

    The tensors are those of `strides`, of which `described` makes the descriptors, three of
    statistics, and the Inputs after v. sizes: what the kernel calls the rows that it owns, and
    those of a step.
    """
    problem, make_call = layout.problem, call_maker(layout)
    of_heads = [of[:3] for of in strides]
    count = len(of_heads)
    tiles = problem.batch * num_heads * tiles_of(problem, seqlen, blocks.own)

    def arranged(*tensors: Any) -> tuple:
        return (
            *(Heads(x, *of) for x, of in zip(tensors, of_heads, strict=False)),
            *described(*tensors[:count]),
            statistics(*tensors[count : count + 3]),
            make_call(*tensors[count + 3 :]),
        )

    return Launch(
        kernel,
        programs_for(blocks, tiles, problem.device),
        (tiles,),
        {
            sizes[0]: blocks.own,
            sizes[1]: blocks.step,
            "IS_PERSISTENT": blocks.programs_per_sm > 0,
        },
        options_of(blocks),
        arranged,
        needs_tensors=blocks.descriptors,
    )
