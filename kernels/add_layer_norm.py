"""Residual + LayerNorm (or RMSNorm) in Triton, forward, and what the backward shares with it;
`leedl_fast.reference.add_layer_norm` derives the formulas.

Rows that fit are read once and kept in registers; a longer row is read once per loop, from the
second loop on out of the cache. Dropout's mask is made anew wherever x is read.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels.attention_blocks import Blocks, blocks_for_rows, programs_for
from leedl_fast.kernels.launching import Launch, Launcher
from leedl_fast.kernels.philox import philox4x32

_MAX_N = 16384  # the longest rows that a program's registers hold
_WIDE_BLOCK = 4096  # columns at a time of longer rows
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 16
_STREAM = tl.constexpr(2)  # reference.philox.ADD_LAYER_NORM_STREAM


class Addends(NamedTuple):
    """What is summed: x, dropped by the seed unless it is None, and residual unless it is None."""

    x_ptr: Any
    residual_ptr: Any
    seed_ptr: Any
    x_stride: Any
    residual_stride: Any
    threshold: Any
    scale: Any


class Operands(NamedTuple):
    """The rest of a forward call."""

    normed_ptr: Any
    summed_ptr: Any
    weight_ptr: Any
    bias_ptr: Any
    rows: Any
    n: Any
    eps: Any


@triton.jit
def load(ptr, offset, mask):
    return tl.load(ptr + offset, mask, other=0).to(tl.float32)


@triton.jit
def _dropout(x, row, first, seed_ptr, threshold, scale):
    """x [BLOCK_M, BLOCK_N] of rows [BLOCK_M] and columns from first on, a multiple of 4: 0 where
    the word of an element is below threshold, times scale elsewhere. All of x for seed_ptr=None."""
    if seed_ptr is not None:
        BLOCK_M: tl.constexpr = x.shape[0]
        BLOCK_N: tl.constexpr = x.shape[1]
        seed = tl.load(seed_ptr)
        zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.uint32)
        block = (first // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)
        w0, w1, w2, w3 = philox4x32(
            zero + block[None, :],
            zero + (row & 0xFFFFFFFF).to(tl.uint32)[:, None],
            zero + ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None],
            zero + _STREAM,
            (seed & 0xFFFFFFFF).to(tl.uint32),
            ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
        )
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        x = tl.where(word.to(tl.int64) >= threshold, x * scale, 0.0)
    return x


@triton.jit
def _load_summed(addends, row, first, mask, DTYPE: tl.constexpr):
    """dropout(x) + residual [BLOCK_M, BLOCK_N] as it is stored, since the backward reads no other
    sum."""
    column = first + tl.arange(0, mask.shape[1])
    x = load(addends.x_ptr, row[:, None] * addends.x_stride + column[None, :], mask)
    x = _dropout(x, row, first, addends.seed_ptr, addends.threshold, addends.scale)
    if addends.residual_ptr is not None:
        offset = row[:, None] * addends.residual_stride + column[None, :]
        x += load(addends.residual_ptr, offset, mask)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _reciprocal_root(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.sqrt_rn(x))


@triton.jit
def center(summed, mask, n, eps, IS_RMS: tl.constexpr):
    """(centered, rstd) of whole rows: summed - mean [BLOCK_M, BLOCK_N], zeros outside, and
    [BLOCK_M]."""
    centered = summed
    if not IS_RMS:
        mean = tl.sum(summed, 1) / n
        centered = tl.where(mask, summed - mean[:, None], 0.0)
    return centered, _reciprocal_root(tl.sum(centered * centered, 1) / n + eps)


@triton.jit
def scale_and_shift(x_hat, weight_ptr, bias_ptr, column, n):
    """x_hat [BLOCK_M, BLOCK_N] * weight + bias, where they are given."""
    if weight_ptr is not None:
        x_hat = x_hat * load(weight_ptr, column, column < n)[None, :]
    if bias_ptr is not None:
        x_hat = x_hat + load(bias_ptr, column, column < n)[None, :]
    return x_hat


@triton.jit
def _forward_rows(
    tile, operands, addends, IS_RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """BLOCK_M whole rows; BLOCK_N >= n."""
    normed_ptr, summed_ptr, weight_ptr, bias_ptr, rows, n, eps = operands
    DTYPE: tl.constexpr = summed_ptr.dtype.element_ty
    row = tl.full((BLOCK_M,), BLOCK_M, tl.int64) * tile + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < n)[None, :]
    summed = _load_summed(addends, row, 0, mask, DTYPE)
    offset = row[:, None] * n + column[None, :]
    tl.store(summed_ptr + offset, summed.to(DTYPE), mask)
    centered, rstd = center(summed, mask, n, eps, IS_RMS)
    normed = scale_and_shift(centered * rstd[:, None], weight_ptr, bias_ptr, column, n)
    tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask)


@triton.jit
def _forward_kernel(
    normed_ptr,
    summed_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    x_stride,
    residual_stride,
    rows,
    n,
    eps,
    threshold,
    scale,
    IS_RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_PERSISTENT: tl.constexpr,
):
    """One program owns BLOCK_M rows or, if IS_PERSISTENT, every k-th BLOCK_M rows from its own on,
    where k programs run.
    """
    addends = Addends(x_ptr, residual_ptr, seed_ptr, x_stride, residual_stride, threshold, scale)
    operands = Operands(normed_ptr, summed_ptr, weight_ptr, bias_ptr, rows, n, eps)
    if IS_PERSISTENT:
        for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
            _forward_rows(tile, operands, addends, IS_RMS, BLOCK_M, BLOCK_N)
    else:
        _forward_rows(tl.program_id(0), operands, addends, IS_RMS, BLOCK_M, BLOCK_N)


@triton.jit
def wide_statistics(
    addends, row, n, eps, DTYPE: tl.constexpr, IS_RMS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(mean, rstd) [1] of one row of the sum, BLOCK_N columns at a time."""
    mean = tl.zeros((1,), tl.float32)
    if not IS_RMS:
        total = tl.zeros((1, BLOCK_N), tl.float32)
        for first in range(0, n, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            mask = (column < n)[None, :]
            total += _load_summed(addends, row, first, mask, DTYPE)
        mean = tl.sum(total, 1) / n
    squares = tl.zeros((1, BLOCK_N), tl.float32)
    for first in range(0, n, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        mask = (column < n)[None, :]
        summed = _load_summed(addends, row, first, mask, DTYPE)
        centered = tl.where(mask, summed - mean[:, None], 0.0)
        squares += centered * centered
    return mean, _reciprocal_root(tl.sum(squares, 1) / n + eps)


@triton.jit
def _wide_forward_kernel(
    normed_ptr,
    summed_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    x_stride,
    residual_stride,
    rows,
    n,
    eps,
    threshold,
    scale,
    IS_RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns BLOCK_M = 1 row, BLOCK_N columns at a time."""
    tl.static_assert(BLOCK_M == 1)
    DTYPE: tl.constexpr = summed_ptr.dtype.element_ty
    addends = Addends(x_ptr, residual_ptr, seed_ptr, x_stride, residual_stride, threshold, scale)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mean, rstd = wide_statistics(addends, row, n, eps, DTYPE, IS_RMS, BLOCK_N)
    for first in range(0, n, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        mask = (column < n)[None, :]
        summed = _load_summed(addends, row, first, mask, DTYPE)
        x_hat = (summed - mean[:, None]) * rstd[:, None]
        normed = scale_and_shift(x_hat, weight_ptr, bias_ptr, column, n)
        offset = row[:, None] * n + column[None, :]
        tl.store(summed_ptr + offset, summed.to(DTYPE), mask)
        tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask)


@triton.jit
def _dropout_kernel(
    dx_ptr,
    dresidual_ptr,
    seed_ptr,
    rows,
    n,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns BLOCK_M rows and BLOCK_N columns of dx."""
    blocks = tl.cdiv(n, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = first + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < n)[None, :]
    offset = row[:, None] * n + column[None, :]
    dx = _dropout(load(dresidual_ptr, offset, mask), row, first, seed_ptr, threshold, scale)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask)


def tile(n: int, min_elements: int) -> dict[str, Any]:
    """Whole rows of at least min_elements together, and the warps for them."""
    block_n = max(4, triton.next_power_of_2(n))  # a counter's words, at least
    block_m = max(1, min_elements // block_n)
    num_warps = min(_MAX_WARPS, max(1, block_m * block_n // _ELEMENTS_PER_WARP))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "enable_fp_fusion": True,
    }


def _threshold_and_scale(dropout_p: float) -> tuple[int, float]:
    return int(dropout_p * 2**32), 1 / (1 - dropout_p)


def _forward_launch(problem: Any, x_stride: int, residual_stride: int) -> Launch:
    rows, n = problem.rows, problem.n
    is_wide = n > _MAX_N
    options = tile(_WIDE_BLOCK, 1) if is_wide else tile(n, 1024)
    block_m, block_n = options.pop("BLOCK_M"), options.pop("BLOCK_N")
    constants = {"IS_RMS": problem.norm == "rms", "BLOCK_M": block_m, "BLOCK_N": block_n}
    programs = triton.cdiv(rows, block_m)
    if not is_wide:
        blocks = blocks_for_rows(problem, Blocks(block_m, block_n, options["num_warps"], 3))
        programs = programs_for(blocks, triton.cdiv(rows, blocks.own), problem.device)
        options |= {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
        constants |= {"BLOCK_M": blocks.own, "IS_PERSISTENT": blocks.programs_per_sm > 0}
    return Launch(
        _wide_forward_kernel if is_wide else _forward_kernel,
        programs,
        (
            x_stride,
            residual_stride,
            rows,
            n,
            problem.eps,
            *_threshold_and_scale(problem.dropout_p),
        ),
        constants,
        options,
    )


launch_forward = Launcher(_forward_launch)


def forward(
    problem: Any,
    normed: Tensor,
    summed: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
) -> None:
    """problem: the Problem of leedl_fast.ops.add_layer_norm; the outputs are contiguous."""
    n = problem.n
    if problem.rows == 0:
        return
    x_stride = residual_stride = n
    if not x.is_contiguous():
        x, x_stride = _rows(x, n)
    if not residual.is_contiguous():
        residual, residual_stride = _rows(residual, n)
    if weight is not None:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    key = (problem, x_stride, residual_stride)
    launch_forward(key, normed, summed, x, residual, weight, bias, seed)


def _rows(x: Tensor, n: int) -> tuple[Tensor, int]:
    """x with contiguous rows, and how far they are apart; no copy where its strides allow it."""
    x = x.reshape(-1, n)
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, x.stride(0)


def _dropout_launch(problem: Any) -> Launch:
    rows, n = problem.rows, problem.n
    options = tile(min(n, _WIDE_BLOCK), 2048)
    block_m, block_n = options.pop("BLOCK_M"), options.pop("BLOCK_N")
    return Launch(
        _dropout_kernel,
        triton.cdiv(rows, block_m) * triton.cdiv(n, block_n),
        (rows, n, *_threshold_and_scale(problem.dropout_p)),
        {"BLOCK_M": block_m, "BLOCK_N": block_n},
        options,
    )


_launch_dropout = Launcher(_dropout_launch)


def dropout_backward(problem: Any, dx: Tensor, dresidual: Tensor, seed: Tensor) -> None:
    """dx = dresidual times what the forward pass multiplied x by; both contiguous."""
    if problem.rows > 0:
        _launch_dropout((problem,), dx, dresidual, seed)
