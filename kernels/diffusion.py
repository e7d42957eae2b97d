"""Diffusion in Triton: noise, noising, the training loss and its gradient, and one sampling step.

All tensors are contiguous (batch, n). One program owns BLOCK elements of one sample, with that
sample's seed, stream and coefficients, all read on the device: its numbers depend on nothing else
in the batch. fp fusion is off: noise, noisy samples and steps in float32 are the CPU backend's, bit
for bit. `leedl_fast.reference.diffusion` states the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leedl_fast.kernels.philox import standard_normal

_BLOCK = 1024
_OPTIONS = {"BLOCK": _BLOCK, "num_warps": 4, "enable_fp_fusion": False}


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


def _grid(batch: int, n: int) -> tuple[int]:
    return (batch * triton.cdiv(n, _BLOCK),)


def randn(out: Tensor, seeds: Tensor, batch: int, n: int) -> None:
    if out.numel():
        _randn_kernel[_grid(batch, n)](out, seeds, n, **_OPTIONS)


def add_noise(
    noisy: Tensor,
    sample: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
    seeds: Tensor | None,
    batch: int,
    n: int,
) -> None:
    if noisy.numel():
        _add_noise_kernel[_grid(batch, n)](noisy, sample, noise, coefficients, seeds, n, **_OPTIONS)


def noise_prediction_loss_forward(
    sums: Tensor,
    model_output: Tensor,
    sample: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    seeds: Tensor | None,
    batch: int,
    n: int,
) -> None:
    (programs,) = _grid(batch, n)
    partial = torch.empty(programs, dtype=torch.float64, device=sums.device)
    if programs:
        _loss_partial_kernel[(programs,)](
            partial, model_output, sample, noise, coefficients, seeds, n, **_OPTIONS
        )
    if batch:
        _loss_sum_kernel[(batch,)](sums, partial, programs // batch, **_OPTIONS)


def noise_prediction_loss_backward(
    dmodel_output: Tensor,
    model_output: Tensor,
    sample: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    dsums: Tensor,
    seeds: Tensor | None,
    batch: int,
    n: int,
) -> None:
    if dmodel_output.numel():
        _loss_backward_kernel[_grid(batch, n)](
            dmodel_output,
            model_output,
            sample,
            noise,
            coefficients,
            dsums,
            seeds,
            n,
            **_OPTIONS,
        )


def step(
    prev_sample: Tensor,
    model_output: Tensor,
    unconditional_output: Tensor | None,
    sample: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
    seeds: Tensor | None,
    streams: Tensor | None,
    batch: int,
    n: int,
    *,
    guidance_scale: float,
    clip_range: float | None,
) -> None:
    if prev_sample.numel():
        _step_kernel[_grid(batch, n)](
            prev_sample,
            model_output,
            unconditional_output,
            sample,
            noise,
            coefficients,
            seeds,
            streams,
            n,
            guidance_scale,
            clip_range,
            **_OPTIONS,
        )
