r"""Diffusion steps in plain PyTorch, all of them linear in sample, model_output and noise.

    add_noise   x_t = c0 sample + c1 noise                      (Ho et al. 2020, equation 4)
    loss        sum (model_output - target)^2, target = c0 sample + c1 noise  (equation 14)
    step        x0 = clip(p x_t + q m); prev_sample = u x0 + w x_t + e m + s noise

with m = unconditional + guidance_scale (model_output - unconditional) under classifier-free
guidance (Ho and Salimans 2022, equation 6). leedl_fast.ops.noise_schedule makes the coefficients.
Noise is what leedl_fast.reference.philox draws from the samples' seeds, unless it is given.
"""

import torch
from torch import Tensor

from leedl_fast.reference.philox import standard_normal


def randn(
    seeds: Tensor, streams: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """(batch, ...) standard normals; sample b is drawn from seeds[b] and streams[b]."""
    per_sample = torch.Size(shape[1:]).numel()
    return standard_normal(per_sample, seeds, streams).to(dtype).view(shape)


def column(coefficients: Tensor, index: int, like: Tensor) -> Tensor:
    """Coefficient `index` of every sample, in the dtype of `like` (float32 at least), broadcast
    over it.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    return coefficients[:, index].to(dtype).view(len(coefficients), *(1,) * (like.dim() - 1))


def combine(coefficients: Tensor, sample: Tensor, noise: Tensor) -> Tensor:
    """c0 sample + c1 noise, in the dtype of sample."""
    c0, c1 = column(coefficients, 0, sample), column(coefficients, 1, sample)
    return (c0 * sample + c1 * noise).to(sample.dtype)


def squared_error(
    model_output: Tensor, sample: Tensor | None, noise: Tensor | None, coefficients: Tensor
) -> Tensor:
    """(batch,) float64: the sum of (model_output - target)^2 of every sample."""
    difference = model_output - target(model_output, sample, noise, coefficients)
    return difference.square().flatten(1).sum(1).to(torch.float64)


def target(
    model_output: Tensor, sample: Tensor | None, noise: Tensor | None, coefficients: Tensor
) -> Tensor:
    """What model_output should be; sample and noise may be None where their coefficient is 0."""
    result = torch.zeros_like(model_output)
    if sample is not None:
        result = result + column(coefficients, 0, model_output) * sample
    if noise is not None:
        result = result + column(coefficients, 1, model_output) * noise
    return result


def step(
    model_output: Tensor,
    unconditional_output: Tensor | None,
    sample: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    clip_range: float | None,
) -> Tensor:
    """One step of a sampler; noise None means the step adds none."""
    p, q, u, w, e, s = (column(coefficients, i, sample) for i in range(6))
    if unconditional_output is not None:
        model_output = unconditional_output + guidance_scale * (model_output - unconditional_output)
    x0 = p * sample + q * model_output
    if clip_range is not None:
        x0 = x0.clamp(-clip_range, clip_range)
    prev_sample = u * x0 + w * sample + e * model_output
    if noise is not None:
        prev_sample = prev_sample + s * noise
    return prev_sample.to(sample.dtype)
