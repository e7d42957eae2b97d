"""Residual + LayerNorm (or RMSNorm) in Triton, backward; `leedl_fast.reference.add_layer_norm`
derives the formulas.

Gradients of weight and bias are summed over the rows of each program, then over the programs, in
an order that the sizes alone decide.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels.add_layer_norm import (
    Addends,
    center,
    load,
    scale_and_shift,
    tile,
    wide_statistics,
)
from leedl_fast.kernels.launching import Launch, Launcher

_MAX_N = 8192  # the longest rows that a program's registers hold
_WIDE_BLOCK = 4096  # columns at a time of longer rows
_WARPS = 4096  # about what fills a GPU, over all programs
_SUM_BLOCK_M, _SUM_BLOCK_N = 32, 64


@triton.jit
def _wide_statistics_kernel(
    mean_ptr, rstd_ptr, summed_ptr, n, eps, IS_RMS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One program owns one row's mean and rstd."""
    DTYPE: tl.constexpr = summed_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    addends = Addends(summed_ptr, None, None, n, 0, 0, 1.0)
    mean, rstd = wide_statistics(addends, row, n, eps, DTYPE, IS_RMS, BLOCK_N)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _load_wide(
    dnormed_ptr, summed_ptr, mean_ptr, rstd_ptr, row, column, rows, n, IS_RMS: tl.constexpr
):
    """(dnormed, x_hat, rstd) of rows [BLOCK_M] and columns [BLOCK_N]; zeros outside."""
    mask = (row < rows)[:, None] & (column < n)[None, :]
    offset = row[:, None] * n + column[None, :]
    dnormed = load(dnormed_ptr, offset, mask)
    rstd = load(rstd_ptr, row, row < rows)
    centered = load(summed_ptr, offset, mask)
    if not IS_RMS:
        mean = load(mean_ptr, row, row < rows)
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
        dx += load(dsummed_ptr, offset, mask)
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
        dnormed = load(dnormed_ptr, offset, mask)
        centered, rstd = center(load(summed_ptr, offset, mask), mask, n, eps, IS_RMS)
        x_hat = centered * rstd[:, None]
        if dweight_partial_ptr is not None:
            dweight += dnormed * x_hat
        if dbias_partial_ptr is not None:
            dbias += dnormed
        g = scale_and_shift(dnormed, weight_ptr, None, column, n)
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
        g = scale_and_shift(g, weight_ptr, None, column, n)
        sum_g += g
        sum_gx += g * x_hat
    mean_g = tl.sum(sum_g, 1) / n
    mean_gx = tl.sum(sum_gx, 1) / n
    for first in range(0, n, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        g, x_hat, rstd = _load_wide(
            dnormed_ptr, summed_ptr, mean_ptr, rstd_ptr, row, column, rows, n, IS_RMS
        )
        g = scale_and_shift(g, weight_ptr, None, column, n)
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


class _Parts(NamedTuple):
    """`programs` partial sums, of rows_per_program rows each.

    tile: the rows and columns of a step, and the compiler's options; is_wide: see `is_wide`.
    """

    programs: int
    rows_per_program: int
    tile: dict[str, Any]
    is_wide: bool


def is_wide(n: int) -> bool:
    """Whether rows of n numbers do not fit registers, and are read once per loop."""
    return n > _MAX_N


@cache
def _parts_of(rows: int, n: int) -> _Parts:
    options = tile(min(n, _WIDE_BLOCK) if is_wide(n) else n, 2048)
    rows_per_program = triton.cdiv(rows, max(1, _WARPS // options["num_warps"]))
    block_m = 1 if is_wide(n) else options["BLOCK_M"]
    rows_per_program = triton.cdiv(max(rows_per_program, 1), block_m) * block_m
    return _Parts(triton.cdiv(rows, rows_per_program), rows_per_program, options, is_wide(n))


def _backward_launch(problem: Any) -> Launch:
    rows, n = problem.rows, problem.n
    parts = _parts_of(rows, n)
    options = dict(parts.tile)
    return Launch(
        _backward_kernel,
        parts.programs,
        (rows, n, problem.eps, parts.rows_per_program),
        {
            "IS_RMS": problem.norm == "rms",
            "BLOCK_M": options.pop("BLOCK_M"),
            "BLOCK_N": options.pop("BLOCK_N"),
        },
        options,
    )


def _sum_launch(programs: int, n: int, *_: Any) -> Launch:
    return Launch(
        _sum_kernel,
        triton.cdiv(n, _SUM_BLOCK_N),
        (programs, n),
        {"BLOCK_M": _SUM_BLOCK_M, "BLOCK_N": _SUM_BLOCK_N},
        {"num_warps": 4, "enable_fp_fusion": True},
    )


def _wide_launch(kernel: Any, programs: int, problem: Any, *numbers: Any) -> Launch:
    """Of a kernel for rows that do not fit registers; numbers: after its tensors."""
    options = dict(_parts_of(problem.rows, problem.n).tile)
    del options["BLOCK_M"]
    constants = {"IS_RMS": problem.norm == "rms", "BLOCK_N": options.pop("BLOCK_N")}
    return Launch(kernel, programs, numbers, constants, options)


def _wide_statistics_launch(problem: Any) -> Launch:
    kernel, rows = _wide_statistics_kernel, problem.rows
    return _wide_launch(kernel, rows, problem, problem.n, problem.eps)


def _wide_dx_launch(problem: Any) -> Launch:
    return _wide_launch(_wide_dx_kernel, problem.rows, problem, problem.rows, problem.n)


def _wide_partial_launch(problem: Any) -> Launch:
    rows, n = problem.rows, problem.n
    parts = _parts_of(rows, n)
    programs = parts.programs * triton.cdiv(n, parts.tile["BLOCK_N"])
    numbers = rows, n, parts.rows_per_program
    return _wide_launch(_wide_partial_kernel, programs, problem, *numbers)


_launch_backward, _launch_sum = Launcher(_backward_launch), Launcher(_sum_launch)
_launch_wide_statistics = Launcher(_wide_statistics_launch)
_launch_wide_dx, _launch_wide_partial = Launcher(_wide_dx_launch), Launcher(_wide_partial_launch)


def backward(
    problem: Any,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dnormed: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
) -> None:
    """problem: the Problem of leedl_fast.ops.add_layer_norm. All tensors are contiguous; dweight
    and dbias only where they are wanted.
    """
    rows, n = problem.rows, problem.n
    parts = _parts_of(rows, n)
    dweight_partial, dbias_partial = (
        None
        if grad is None
        else torch.empty(parts.programs, n, dtype=torch.float32, device=grad.device)
        for grad in (dweight, dbias)
    )
    partial = dweight_partial, dbias_partial
    if rows and not parts.is_wide:
        _launch_backward((problem,), dx, *partial, dnormed, dsummed, summed, weight)
    elif rows:
        _wide_backward(problem, parts, dx, *partial, dnormed, dsummed, summed, weight)
    if dweight is not None or dbias is not None:
        key = (parts.programs, n, problem.parameter_dtype, problem.device)
        _launch_sum(key, dweight, dbias, *partial)


def _wide_backward(
    problem: Any,
    parts: _Parts,
    dx: Tensor,
    dweight_partial: Tensor | None,
    dbias_partial: Tensor | None,
    dnormed: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
) -> None:
    mean = torch.empty(problem.rows, dtype=torch.float32, device=dx.device)
    rstd = torch.empty_like(mean)  # of its own, so that its address is aligned
    _launch_wide_statistics((problem,), mean, rstd, summed)
    _launch_wide_dx((problem,), dx, dnormed, dsummed, summed, mean, rstd, weight)
    if dweight_partial is not None or dbias_partial is not None:
        partial = dweight_partial, dbias_partial
        _launch_wide_partial((problem,), *partial, dnormed, summed, mean, rstd)
