"""Diffusion in Triton: noise, noising, the training loss and its gradient, and one sampling step.

All tensors are contiguous (batch, n). One program owns BLOCK elements of one sample, with that
sample's seed, stream and coefficients, all read on the device: its numbers depend on nothing else
in the batch. fp fusion is off: noise, noisy samples and steps in float32 are the CPU backend's, bit
for bit. `leedl_fast.reference.diffusion` states the formulas.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels.launching import Launch, Launcher
from leedl_fast.kernels.philox import standard_normal

_BLOCK = 1024
_CONSTANTS = {"BLOCK": _BLOCK}
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _block(n, BLOCK: tl.constexpr):
    """(sample, first element within it) of this program, int64."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n, BLOCK)
    return program // blocks, program % blocks * BLOCK


@triton.jit
def _noise(noise_ptr, seeds_ptr, streams_ptr, sample, first, n, coefficient, BLOCK: tl.constexpr):
    """The noise given, or made from the sample's seed. Not read where its coefficient is 0."""
    if noise_ptr is not None:
        i = first + tl.arange(0, BLOCK)
        end = tl.where(coefficient != 0, n, 0)
        z = tl.load(noise_ptr + sample * n + i, i < end, other=0).to(tl.float32)
    elif seeds_ptr is not None:
        seed = tl.load(seeds_ptr + sample)
        if streams_ptr is not None:
            stream = tl.load(streams_ptr + sample)
        else:
            stream = tl.zeros((), tl.int64)
        z = standard_normal(seed, stream, first, BLOCK)
    else:
        z = tl.zeros((BLOCK,), tl.float32)
    return z


@triton.jit
def _target(
    sample_ptr, noise_ptr, coefficients_ptr, seeds_ptr, sample, first, n, BLOCK: tl.constexpr
):
    """c0 sample + c1 noise; a term is not read where its coefficient is 0."""
    c0 = tl.load(coefficients_ptr + sample * 2)
    c1 = tl.load(coefficients_ptr + sample * 2 + 1)
    z = _noise(noise_ptr, seeds_ptr, None, sample, first, n, c1, BLOCK)
    i = first + tl.arange(0, BLOCK)
    if sample_ptr is not None:
        end = tl.where(c0 != 0, n, 0)
        x = tl.load(sample_ptr + sample * n + i, i < end, other=0).to(tl.float32)
    else:
        x = tl.zeros((BLOCK,), tl.float32)
    return c0.to(tl.float32) * x + c1.to(tl.float32) * z


@triton.jit
def _randn_kernel(out_ptr, seeds_ptr, n, BLOCK: tl.constexpr):
    sample, first = _block(n, BLOCK)
    z = _noise(None, seeds_ptr, None, sample, first, n, 1, BLOCK)
    i = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + sample * n + i, z.to(out_ptr.dtype.element_ty), i < n)


@triton.jit
def _add_noise_kernel(
    noisy_ptr, sample_ptr, noise_ptr, coefficients_ptr, seeds_ptr, n, BLOCK: tl.constexpr
):
    sample, first = _block(n, BLOCK)
    c0 = tl.load(coefficients_ptr + sample * 2).to(tl.float32)
    c1 = tl.load(coefficients_ptr + sample * 2 + 1).to(tl.float32)
    z = _noise(noise_ptr, seeds_ptr, None, sample, first, n, c1, BLOCK)
    i = first + tl.arange(0, BLOCK)
    x = tl.load(sample_ptr + sample * n + i, i < n, other=0).to(tl.float32)
    noisy = c0 * x + c1 * z
    tl.store(noisy_ptr + sample * n + i, noisy.to(noisy_ptr.dtype.element_ty), i < n)


@triton.jit
def _loss_partial_kernel(
    partial_ptr,
    model_output_ptr,
    sample_ptr,
    noise_ptr,
    coefficients_ptr,
    seeds_ptr,
    n,
    BLOCK: tl.constexpr,
):
    """partial[program] = the squared error of the program's elements."""
    sample, first = _block(n, BLOCK)
    i = first + tl.arange(0, BLOCK)
    target = _target(sample_ptr, noise_ptr, coefficients_ptr, seeds_ptr, sample, first, n, BLOCK)
    y = tl.load(model_output_ptr + sample * n + i, i < n, other=0).to(tl.float32)
    difference = tl.where(i < n, y - target, 0.0)
    total = tl.sum(difference * difference, 0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64), total.to(tl.float64))


@triton.jit
def _loss_sum_kernel(sums_ptr, partial_ptr, blocks, BLOCK: tl.constexpr):
    """sums[sample] = the sum of the sample's partial sums, in a fixed order."""
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, blocks, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + sample * blocks + i, i < blocks, other=0)
    tl.store(sums_ptr + sample, tl.sum(total, 0))


@triton.jit
def _loss_backward_kernel(
    dmodel_output_ptr,
    model_output_ptr,
    sample_ptr,
    noise_ptr,
    coefficients_ptr,
    dsums_ptr,
    seeds_ptr,
    n,
    BLOCK: tl.constexpr,
):
    sample, first = _block(n, BLOCK)
    i = first + tl.arange(0, BLOCK)
    target = _target(sample_ptr, noise_ptr, coefficients_ptr, seeds_ptr, sample, first, n, BLOCK)
    y = tl.load(model_output_ptr + sample * n + i, i < n, other=0).to(tl.float32)
    scale = (2 * tl.load(dsums_ptr + sample)).to(tl.float32)
    dy = scale * (y - target)
    tl.store(dmodel_output_ptr + sample * n + i, dy.to(dmodel_output_ptr.dtype.element_ty), i < n)


@triton.jit
def _step_kernel(
    prev_sample_ptr,
    model_output_ptr,
    unconditional_output_ptr,
    sample_ptr,
    noise_ptr,
    coefficients_ptr,
    seeds_ptr,
    streams_ptr,
    n,
    guidance_scale,
    clip_range,
    BLOCK: tl.constexpr,
):
    sample, first = _block(n, BLOCK)
    coefficients_ptr += sample * 6
    p = tl.load(coefficients_ptr)
    q = tl.load(coefficients_ptr + 1)
    u = tl.load(coefficients_ptr + 2)
    w = tl.load(coefficients_ptr + 3)
    e = tl.load(coefficients_ptr + 4)
    s = tl.load(coefficients_ptr + 5)

    z = _noise(noise_ptr, seeds_ptr, streams_ptr, sample, first, n, s, BLOCK)
    i = first + tl.arange(0, BLOCK)
    offset = sample * n + i
    x = tl.load(sample_ptr + offset, i < n, other=0).to(tl.float32)
    m = tl.load(model_output_ptr + offset, i < n, other=0).to(tl.float32)
    if unconditional_output_ptr is not None:
        base = tl.load(unconditional_output_ptr + offset, i < n, other=0).to(tl.float32)
        m = base + guidance_scale * (m - base)
    if clip_range is not None:
        x0 = p.to(tl.float32) * x + q.to(tl.float32) * m
        x0 = tl.where(x0 < -clip_range, -clip_range, x0)  # in this order NaN stays NaN
        x0 = tl.where(x0 > clip_range, clip_range, x0)
        kept = u.to(tl.float32) * x0 + w.to(tl.float32) * x
        prev_sample = kept + (e.to(tl.float32) * m + s.to(tl.float32) * z)
    else:
        kept = (w + u * p).to(tl.float32) * x + (e + u * q).to(tl.float32) * m
        prev_sample = kept + s.to(tl.float32) * z
    tl.store(prev_sample_ptr + offset, prev_sample.to(prev_sample_ptr.dtype.element_ty), i < n)


def _blocks(problem: Any) -> int:
    """How many programs make one sample."""
    return triton.cdiv(problem.n, _BLOCK)


def _launcher(kernel: Any, numbers: Callable[[Any], tuple] = lambda problem: ()) -> Launcher:
    """Of a kernel that takes n and numbers(problem) after its tensors."""

    def plan(problem: Any) -> Launch:
        programs = problem.batch * _blocks(problem)
        return Launch(kernel, programs, (problem.n, *numbers(problem)), _CONSTANTS, _OPTIONS)

    return Launcher(plan)


def _sum_launch(problem: Any) -> Launch:
    return Launch(_loss_sum_kernel, problem.batch, (_blocks(problem),), _CONSTANTS, _OPTIONS)


_launch_randn = _launcher(_randn_kernel)
_launch_add_noise = _launcher(_add_noise_kernel)
_launch_loss_partial = _launcher(_loss_partial_kernel)
_launch_loss_sum = Launcher(_sum_launch)
_launch_loss_backward = _launcher(_loss_backward_kernel)
_launch_step = _launcher(_step_kernel, lambda problem: (problem.guidance_scale, problem.clip_range))


def randn(problem: Any, out: Tensor, seeds: Tensor) -> None:
    """problem: the Problem of leedl_fast.ops.diffusion_operators, here and below."""
    if out.numel():
        _launch_randn((problem,), out, seeds)


def add_noise(
    problem: Any,
    noisy: Tensor,
    sample: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
    seeds: Tensor | None,
) -> None:
    if noisy.numel():
        _launch_add_noise((problem,), noisy, sample, noise, coefficients, seeds)


def noise_prediction_loss_forward(
    problem: Any,
    sums: Tensor,
    model_output: Tensor,
    sample: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    seeds: Tensor | None,
) -> None:
    programs = problem.batch * _blocks(problem)
    partial = torch.empty(programs, dtype=torch.float64, device=sums.device)
    if programs:
        tensors = partial, model_output, sample, noise, coefficients, seeds
        _launch_loss_partial((problem,), *tensors)
    if problem.batch:
        _launch_loss_sum((problem,), sums, partial)


def noise_prediction_loss_backward(
    problem: Any,
    dmodel_output: Tensor,
    model_output: Tensor,
    sample: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    dsums: Tensor,
    seeds: Tensor | None,
) -> None:
    if dmodel_output.numel():
        tensors = dmodel_output, model_output, sample, noise, coefficients, dsums, seeds
        _launch_loss_backward((problem,), *tensors)


def step(
    problem: Any,
    prev_sample: Tensor,
    model_output: Tensor,
    unconditional_output: Tensor | None,
    sample: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
    seeds: Tensor | None,
    streams: Tensor | None,
) -> None:
    if prev_sample.numel():
        _launch_step(
            (problem,),
            prev_sample,
            model_output,
            unconditional_output,
            sample,
            noise,
            coefficients,
            seeds,
            streams,
        )
