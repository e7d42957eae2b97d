"""Residual + LayerNorm (or RMSNorm) in Triton; `leedl_fast.reference.add_layer_norm` derives the
formulas.

Rows that fit are read once and kept in registers; a longer row is read once per loop, from the
second loop on out of the cache. Gradients of weight and bias are summed over the rows of each
program, then over the programs, in an order that the sizes alone decide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_FORWARD_N = 16384  # the longest rows that a program's registers hold
_MAX_BACKWARD_N = 8192
_WIDE_BLOCK = 4096  # columns at a time of longer rows
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 16
_BACKWARD_WARPS = 4096  # about what fills a GPU, over all programs
_SUM_BLOCK_M, _SUM_BLOCK_N = 32, 64


@triton.jit
def _load(ptr, offset, mask):
    return tl.load(ptr + offset, mask, other=0).to(tl.float32)


@triton.jit
def _load_summed(
    x_ptr, residual_ptr, row, column, x_stride, residual_stride, mask, DTYPE: tl.constexpr
):
    """x + residual [BLOCK_M, BLOCK_N] as it is stored, since the backward reads no other sum; x
    alone where residual is None."""
    x = _load(x_ptr, row[:, None] * x_stride + column[None, :], mask)
    if residual_ptr is not None:
        x += _load(residual_ptr, row[:, None] * residual_stride + column[None, :], mask)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _reciprocal_root(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.sqrt_rn(x))


@triton.jit
def _center(summed, mask, n, eps, IS_RMS: tl.constexpr):
    """(centered, rstd) of whole rows: summed - mean [BLOCK_M, BLOCK_N], zeros outside, and
    [BLOCK_M]."""
    centered = summed
    if not IS_RMS:
        mean = tl.sum(summed, 1) / n
        centered = tl.where(mask, summed - mean[:, None], 0.0)
    return centered, _reciprocal_root(tl.sum(centered * centered, 1) / n + eps)


@triton.jit
def _scale_and_shift(x_hat, weight_ptr, bias_ptr, column, n):
    """x_hat [BLOCK_M, BLOCK_N] * weight + bias, where they are given."""
    if weight_ptr is not None:
        x_hat = x_hat * _load(weight_ptr, column, column < n)[None, :]
    if bias_ptr is not None:
        x_hat = x_hat + _load(bias_ptr, column, column < n)[None, :]
    return x_hat


@triton.jit
def _forward_kernel(
    normed_ptr,
    summed_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    x_stride,
    residual_stride,
    rows,
    n,
    eps,
    IS_RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns BLOCK_M rows; BLOCK_N >= n."""
    DTYPE: tl.constexpr = summed_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < n)[None, :]
    summed = _load_summed(x_ptr, residual_ptr, row, column, x_stride, residual_stride, mask, DTYPE)
    offset = row[:, None] * n + column[None, :]
    tl.store(summed_ptr + offset, summed.to(DTYPE), mask)
    centered, rstd = _center(summed, mask, n, eps, IS_RMS)
    normed = _scale_and_shift(centered * rstd[:, None], weight_ptr, bias_ptr, column, n)
    tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask)


@triton.jit
def _wide_statistics(
    x_ptr,
    residual_ptr,
    row,
    x_stride,
    residual_stride,
    n,
    eps,
    DTYPE: tl.constexpr,
    IS_RMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(mean, rstd) [1] of one row of x + residual, BLOCK_N columns at a time."""
    mean = tl.zeros((1,), tl.float32)
    if not IS_RMS:
        total = tl.zeros((1, BLOCK_N), tl.float32)
        for first in range(0, n, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            mask = (column < n)[None, :]
            total += _load_summed(
                x_ptr, residual_ptr, row, column, x_stride, residual_stride, mask, DTYPE
            )
        mean = tl.sum(total, 1) / n
    squares = tl.zeros((1, BLOCK_N), tl.float32)
    for first in range(0, n, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        mask = (column < n)[None, :]
        summed = _load_summed(
            x_ptr, residual_ptr, row, column, x_stride, residual_stride, mask, DTYPE
        )
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
    x_stride,
    residual_stride,
    rows,
    n,
    eps,
    IS_RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns BLOCK_M = 1 row, BLOCK_N columns at a time."""
    tl.static_assert(BLOCK_M == 1)
    DTYPE: tl.constexpr = summed_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mean, rstd = _wide_statistics(
        x_ptr, residual_ptr, row, x_stride, residual_stride, n, eps, DTYPE, IS_RMS, BLOCK_N
    )
    for first in range(0, n, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        mask = (column < n)[None, :]
        summed = _load_summed(
            x_ptr, residual_ptr, row, column, x_stride, residual_stride, mask, DTYPE
        )
        x_hat = (summed - mean[:, None]) * rstd[:, None]
        normed = _scale_and_shift(x_hat, weight_ptr, bias_ptr, column, n)
        offset = row[:, None] * n + column[None, :]
        tl.store(summed_ptr + offset, summed.to(DTYPE), mask)
        tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask)


@triton.jit
def _wide_statistics_kernel(
    mean_ptr, rstd_ptr, summed_ptr, n, eps, IS_RMS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One program owns one row's mean and rstd."""
    DTYPE: tl.constexpr = summed_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mean, rstd = _wide_statistics(summed_ptr, None, row, n, 0, n, eps, DTYPE, IS_RMS, BLOCK_N)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _load_wide(
    dnormed_ptr, summed_ptr, mean_ptr, rstd_ptr, row, column, rows, n, IS_RMS: tl.constexpr
):
    """(dnormed, x_hat, rstd) of rows [BLOCK_M] and columns [BLOCK_N]; zeros outside."""
    mask = (row < rows)[:, None] & (column < n)[None, :]
    offset = row[:, None] * n + column[None, :]
    dnormed = _load(dnormed_ptr, offset, mask)
    rstd = _load(rstd_ptr, row, row < rows)
    centered = _load(summed_ptr, offset, mask)
    if not IS_RMS:
        mean = _load(mean_ptr, row, row < rows)
        centered = tl.where(mask, centered - mean[:, None], 0.0)
    return dnormed, centered * rstd[:, None], rstd


@triton.jit
def _store_dx(
    dx_ptr, dsummed_ptr, g, x_hat, rstd, mean_g, mean_gx, row, column, rows, n, IS_RMS: tl.constexpr
):
    """dx = dsummed + rstd (g - mean(g) - x_hat mean(g x_hat)), with g = dnormed weight."""
    mask = (row < rows)[:, None] & (column < n)[None, :]
    offset = row[:, None] * n + column[None, :]
    dx = g - x_hat * mean_gx[:, None]
    if not IS_RMS:
        dx -= mean_g[:, None]
    dx *= rstd[:, None]
    if dsummed_ptr is not None:
        dx += _load(dsummed_ptr, offset, mask)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    dx_ptr,
    dweight_partial_ptr,
    dbias_partial_ptr,
    dnormed_ptr,
    dsummed_ptr,
    summed_ptr,
    weight_ptr,
    rows,
    n,
    eps,
    rows_per_program,
    IS_RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns rows_per_program rows of dx, BLOCK_M at a time, and one row of the partial
    sums; BLOCK_N >= n.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rows_per_program, BLOCK_M):
        row = program * rows_per_program + first + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & (column < n)[None, :]
        offset = row[:, None] * n + column[None, :]
        dnormed = _load(dnormed_ptr, offset, mask)
        centered, rstd = _center(_load(summed_ptr, offset, mask), mask, n, eps, IS_RMS)
        x_hat = centered * rstd[:, None]
        if dweight_partial_ptr is not None:
            dweight += dnormed * x_hat
        if dbias_partial_ptr is not None:
            dbias += dnormed
        g = _scale_and_shift(dnormed, weight_ptr, None, column, n)
        mean_g = tl.sum(g, 1) / n
        mean_gx = tl.sum(g * x_hat, 1) / n
        _store_dx(
            dx_ptr, dsummed_ptr, g, x_hat, rstd, mean_g, mean_gx, row, column, rows, n, IS_RMS
        )
    offset = program * n + column
    if dweight_partial_ptr is not None:
        tl.store(dweight_partial_ptr + offset, tl.sum(dweight, 0), column < n)
    if dbias_partial_ptr is not None:
        tl.store(dbias_partial_ptr + offset, tl.sum(dbias, 0), column < n)


@triton.jit
def _wide_dx_kernel(
    dx_ptr,
    dnormed_ptr,
    dsummed_ptr,
    summed_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    rows,
    n,
    IS_RMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns one row of dx, BLOCK_N columns at a time."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    sum_g = tl.zeros((1, BLOCK_N), tl.float32)
    sum_gx = tl.zeros((1, BLOCK_N), tl.float32)
    for first in range(0, n, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        g, x_hat, rstd = _load_wide(
            dnormed_ptr, summed_ptr, mean_ptr, rstd_ptr, row, column, rows, n, IS_RMS
        )
        g = _scale_and_shift(g, weight_ptr, None, column, n)
        sum_g += g
        sum_gx += g * x_hat
    mean_g = tl.sum(sum_g, 1) / n
    mean_gx = tl.sum(sum_gx, 1) / n
    for first in range(0, n, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        g, x_hat, rstd = _load_wide(
            dnormed_ptr, summed_ptr, mean_ptr, rstd_ptr, row, column, rows, n, IS_RMS
        )
        g = _scale_and_shift(g, weight_ptr, None, column, n)
        _store_dx(
            dx_ptr, dsummed_ptr, g, x_hat, rstd, mean_g, mean_gx, row, column, rows, n, IS_RMS
        )


@triton.jit
def _wide_partial_kernel(
    dweight_partial_ptr,
    dbias_partial_ptr,
    dnormed_ptr,
    summed_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    n,
    rows_per_program,
    IS_RMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns BLOCK_N columns of one row of the partial sums."""
    blocks = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0).to(tl.int64) // blocks
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((1, BLOCK_N), tl.float32)
    dbias = tl.zeros((1, BLOCK_N), tl.float32)
    for i in range(0, rows_per_program):
        row = program * rows_per_program + i + tl.arange(0, 1)
        dnormed, x_hat, _ = _load_wide(
            dnormed_ptr, summed_ptr, mean_ptr, rstd_ptr, row, column, rows, n, IS_RMS
        )
        dweight += dnormed * x_hat
        dbias += dnormed
    offset = program * n + column
    if dweight_partial_ptr is not None:
        tl.store(dweight_partial_ptr + offset, tl.sum(dweight, 0), column < n)
    if dbias_partial_ptr is not None:
        tl.store(dbias_partial_ptr + offset, tl.sum(dbias, 0), column < n)


@triton.jit
def _sum_kernel(
    dweight_ptr,
    dbias_ptr,
    dweight_partial_ptr,
    dbias_partial_ptr,
    programs,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns BLOCK_N columns: the partial sums, added over the programs."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, programs, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        mask = (row < programs)[:, None] & (column < n)[None, :]
        offset = row.to(tl.int64)[:, None] * n + column[None, :]
        if dweight_ptr is not None:
            dweight += tl.load(dweight_partial_ptr + offset, mask, other=0)
        if dbias_ptr is not None:
            dbias += tl.load(dbias_partial_ptr + offset, mask, other=0)
    if dweight_ptr is not None:
        total = tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + column, total, column < n)
    if dbias_ptr is not None:
        total = tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + column, total, column < n)


def _tile(n: int, min_elements: int) -> dict[str, int | bool]:
    """Whole rows of at least min_elements together, and the warps for them."""
    block_n = triton.next_power_of_2(n)
    block_m = max(1, min_elements // block_n)
    num_warps = min(_MAX_WARPS, max(1, block_m * block_n // _ELEMENTS_PER_WARP))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "enable_fp_fusion": True,
    }


def forward(
    normed: Tensor,
    summed: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    is_rms: bool,
) -> None:
    """x, residual: (rows, n) with contiguous rows; the outputs, weight and bias contiguous."""
    rows, n = x.shape
    if rows == 0:
        return
    if n <= _MAX_FORWARD_N:
        kernel, options = _forward_kernel, _tile(n, 1024)
    else:
        kernel, options = _wide_forward_kernel, {**_tile(_WIDE_BLOCK, 1), "BLOCK_M": 1}
    kernel[(triton.cdiv(rows, options["BLOCK_M"]),)](
        normed,
        summed,
        x,
        residual,
        weight,
        bias,
        x.stride(0),
        residual.stride(0),
        rows,
        n,
        eps,
        is_rms,
        **options,
    )


def backward(
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dnormed: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    *,
    rows: int,
    n: int,
    eps: float,
    is_rms: bool,
) -> None:
    """All tensors contiguous; dweight and dbias only where they are wanted."""
    is_wide = n > _MAX_BACKWARD_N
    options = _tile(min(n, _WIDE_BLOCK) if is_wide else n, 2048)
    block_m, num_warps = options["BLOCK_M"], options["num_warps"]
    rows_per_program = triton.cdiv(rows, max(1, _BACKWARD_WARPS // num_warps))
    rows_per_program = triton.cdiv(max(rows_per_program, 1), block_m) * block_m
    programs = triton.cdiv(rows, rows_per_program)
    dweight_partial, dbias_partial = (
        None if grad is None else torch.empty(programs, n, dtype=torch.float32, device=grad.device)
        for grad in (dweight, dbias)
    )
    if rows and not is_wide:
        _backward_kernel[(programs,)](
            dx,
            dweight_partial,
            dbias_partial,
            dnormed,
            dsummed,
            summed,
            weight,
            rows,
            n,
            eps,
            rows_per_program,
            is_rms,
            **options,
        )
    elif rows:
        del options["BLOCK_M"]
        mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=dx.device)
        _wide_statistics_kernel[(rows,)](mean, rstd, summed, n, eps, is_rms, **options)
        _wide_dx_kernel[(rows,)](
            dx, dnormed, dsummed, summed, mean, rstd, weight, rows, n, is_rms, **options
        )
        if dweight is not None or dbias is not None:
            blocks = triton.cdiv(n, options["BLOCK_N"])
            _wide_partial_kernel[(programs * blocks,)](
                dweight_partial,
                dbias_partial,
                dnormed,
                summed,
                mean,
                rstd,
                rows,
                n,
                rows_per_program,
                is_rms,
                **options,
            )
    if dweight is not None or dbias is not None:
        _sum_kernel[(triton.cdiv(n, _SUM_BLOCK_N),)](
            dweight,
            dbias,
            dweight_partial,
            dbias_partial,
            programs,
            n,
            BLOCK_M=_SUM_BLOCK_M,
            BLOCK_N=_SUM_BLOCK_N,
            num_warps=4,
            enable_fp_fusion=True,
        )
