"""Diffusion: the contract (checks, outputs) of noise, its loss, and the samplers' steps."""

import torch
from torch import Tensor

from leedl_fast.backends import Implementation
from leedl_fast.ops import checks
from leedl_fast.ops import diffusion_operators as operators
from leedl_fast.ops.contract import Function, Operator, Resolved, needs_grad, resolver, traced
from leedl_fast.ops.diffusion_operators import Problem
from leedl_fast.ops.noise_schedule import (
    PREDICTION_TYPES,
    NoiseSchedule,
    Timesteps,
    timestep_vector,
)
from leedl_fast.ops.seeds import sample_seeds
from leedl_fast.reference import diffusion as reference

__all__ = [
    "NoiseSchedule",
    "add_noise",
    "ddim_step",
    "ddpm_step",
    "noise_prediction_loss",
    "randn",
    "sample_seeds",
]

Seed = int | Tensor | torch.Generator


def randn(
    shape: tuple[int, ...],
    *,
    seed: Seed,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """Standard normal numbers that are the same on every backend and device, at any batch size.

    Args:
        shape: (batch, ...). Element i of sample b depends on seed and b alone: Philox4x32-10
            (Salmon et al. 2011) keyed by the sample's seed, then Box-Muller made of exactly rounded
            operations.
        seed: an int (sample b's key comes from `sample_seeds`), a (batch,) int64 tensor of keys, or
            a torch.Generator, which means torch's own stream, torch.randn(shape, generator=seed).
        dtype: float32, float64, bfloat16 or float16. The numbers are made in float32 and converted.
        device: where the result lies.
        backend: "cpu", "triton", "cuda" or "eager"; by default the fastest that takes the problem.

    Returns:
        A tensor of that shape. Not differentiable.

    Raises:
        ValueError: shape is empty or negative, or seed has the wrong shape. TypeError: a wrong
            type.
    """
    shape = tuple(shape)
    for size in shape:
        checks.check_int("shape", size)
        if size < 0:
            raise ValueError(f"shape must have sizes of at least 0, got {shape}")
    device = torch.device(device)
    if isinstance(seed, torch.Generator):
        return torch.randn(shape, generator=seed, dtype=dtype, device=device)
    problem, implementation, _ = _resolve(backend, (), shape, dtype, device)
    seeds = sample_seeds(seed, problem.batch, device)
    if implementation.backend == "eager":
        return reference.randn(seeds, None, shape, dtype)
    return _run(operators.randn, None, implementation, problem, seeds)


def add_noise(
    sample: Tensor,
    timesteps: Timesteps,
    schedule: NoiseSchedule,
    *,
    seed: Seed | None = None,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x_t = sqrt(abar_t) sample + sqrt(1 - abar_t) noise (Ho et al. 2020, equation 4).

    Args:
        sample: (batch, ...), float32, float64, bfloat16 or float16: the clean samples.
        timesteps: an int for all, or (batch,) int64, from 0 to schedule.num_timesteps - 1.
        schedule: the variance schedule.
        seed: where the noise comes from, as in `randn`; it is made in the kernel and never stored.
            `noise_prediction_loss` with the same seed makes it again. Draw a new seed per step.
        noise: the noise itself, of the shape and dtype of sample, instead of a seed.
        backend: "cpu", "triton", "cuda" or "eager"; by default the fastest that takes the problem.

    Returns:
        The noisy samples, of the shape and dtype of sample; differentiable in sample and noise.

    Raises:
        ValueError: a shape, a device or a timestep is wrong, or not just one of seed and noise is
            given.
        TypeError: a dtype or a type is wrong.
    """
    problem, implementation, _ = _resolve_tensor("sample", sample, backend)
    seeds, noise = _noise_source(problem, seed, noise)
    coefficients = schedule.add_noise_coefficients(timesteps, problem.batch, problem.device)
    if implementation.backend == "eager":
        noise = _drawn(problem, noise, seeds, None)
        return reference.combine(coefficients, sample, noise)
    tensors = sample.contiguous(), noise, coefficients, seeds
    function = operators.AddNoiseFunction
    return _run(operators.add_noise, function, implementation, problem, *tensors)


def noise_prediction_loss(
    model_output: Tensor,
    sample: Tensor,
    timesteps: Timesteps,
    schedule: NoiseSchedule,
    *,
    seed: Seed | None = None,
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The squared error between model_output and what it should predict (Ho et al. 2020, equation
    14).

    The target is the noise of `add_noise` (prediction_type="epsilon"), sqrt(abar_t) noise -
    sqrt(1 - abar_t) sample ("v_prediction", Salimans and Ho 2022) or the clean sample ("sample").
    The noise is made again from the seed, in the loss and in its backward.

    Args:
        model_output: (batch, ...), what the model said of add_noise(sample, timesteps, ...).
        sample: the clean samples, of the shape, dtype and device of model_output.
        timesteps, schedule, seed, noise: the same as given to `add_noise`.
        prediction_type: "epsilon", "v_prediction" or "sample".
        reduction: "mean" over all elements, or "sum".
        backend: "cpu", "triton", "cuda" or "eager"; by default the fastest that takes the problem.

    Returns:
        A scalar of the dtype of model_output; sums are float64 on the CPU. Differentiable any
        number of times in model_output, sample and noise.

    Raises:
        As `add_noise`; ValueError for an unknown prediction_type or reduction.
    """
    checks.check_choice("reduction", reduction, ("mean", "sum"))
    checks.check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    problem, implementation, _ = _resolve_tensor("model_output", model_output, backend)
    _check_like("sample", sample, problem, "model_output")
    device = problem.device
    seeds = None
    if prediction_type != "sample":
        seeds, noise = _noise_source(problem, seed, noise)
    coefficients = schedule.target_coefficients(timesteps, prediction_type, problem.batch, device)
    target_sample = None if prediction_type == "epsilon" else sample.contiguous()
    tensors = model_output.contiguous(), target_sample, noise, coefficients, seeds
    if implementation.backend == "eager":
        if prediction_type != "sample":
            noise = _drawn(problem, noise, seeds, None)
        sums = reference.squared_error(model_output, target_sample, noise, coefficients)
    else:
        function = operators.NoisePredictionLossFunction
        sums = _run(operators.loss_forward, function, implementation, problem, *tensors)
    total = sums.sum()
    if reduction == "mean":
        total = total / model_output.numel()
    return total.to(model_output.dtype)


def ddpm_step(
    model_output: Tensor,
    timesteps: Timesteps,
    sample: Tensor,
    schedule: NoiseSchedule,
    *,
    seed: Seed | None = None,
    noise: Tensor | None = None,
    prev_timesteps: Timesteps | None = None,
    prediction_type: str = "epsilon",
    variance: str = "fixed_small",
    clip_range: float | None = None,
    unconditional_output: Tensor | None = None,
    guidance_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One ancestral step from x_t to x_{t-1} (Ho et al. 2020, algorithm 2; equations 6 and 7).

    Args:
        model_output: (batch, ...), the model's output for sample at timesteps.
        timesteps: an int for all, or (batch,) int64, from 0 to schedule.num_timesteps - 1.
        sample: x_t, of the shape, dtype and device of model_output.
        schedule: the variance schedule.
        seed: where the noise comes from, as in `randn`. Every timestep has a stream of its own
            under one seed, so a whole sampling run may use one seed; `randn` with that seed is
            independent too.
        noise: the noise itself, of the shape and dtype of sample, instead of a seed.
        prev_timesteps: where the step leads, -1 being the clean sample; timesteps - 1 by default.
        prediction_type: what the model predicts, "epsilon", "v_prediction" or "sample".
        variance: "fixed_small", the posterior's, or "fixed_large", beta_t.
        clip_range: clip the predicted clean sample to [-clip_range, clip_range].
        unconditional_output, guidance_scale: classifier-free guidance (Ho and Salimans 2022): the
            model is taken to have said unconditional_output + guidance_scale (model_output -
            unconditional_output).
        backend: "cpu", "triton", "cuda" or "eager"; by default the fastest that takes the problem.

    Returns:
        prev_sample, of the shape and dtype of sample; the step to the clean sample adds no noise.
        Differentiable in model_output, unconditional_output and sample.

    Raises:
        As `add_noise`; ValueError for a wrong option.
    """
    problem, implementation, _ = _resolve_tensor("sample", sample, backend)
    seeds, noise = _noise_source(problem, seed, noise)
    coefficients = schedule.ddpm_coefficients(
        timesteps, prev_timesteps, prediction_type, variance, problem.batch, problem.device
    )
    tensors = model_output, unconditional_output, sample, noise, coefficients, seeds
    return _run_step(
        implementation, problem, schedule, timesteps, tensors, guidance_scale, clip_range
    )


def ddim_step(
    model_output: Tensor,
    timesteps: Timesteps,
    sample: Tensor,
    schedule: NoiseSchedule,
    *,
    prev_timesteps: Timesteps | None = None,
    eta: float = 0.0,
    seed: Seed | None = None,
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    clip_range: float | None = None,
    unconditional_output: Tensor | None = None,
    guidance_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One implicit step from timesteps to prev_timesteps (Song et al. 2021, equations 12 and 16).

    Args:
        prev_timesteps: where the step leads, -1 being the clean sample; timesteps - 1 by default.
        eta: 0 is the deterministic step, 1 the ancestral one; with eta > 0 give a seed or the
            noise.
        model_output, timesteps, sample, schedule, seed, noise, prediction_type, clip_range,
        unconditional_output, guidance_scale, backend: as in `ddpm_step`. As in the paper, the noise
            that the step keeps is what the model said, whether or not the clean sample was clipped.

    Returns:
        prev_sample, of the shape and dtype of sample.

    Raises:
        As `ddpm_step`.
    """
    problem, implementation, _ = _resolve_tensor("sample", sample, backend)
    coefficients = schedule.ddim_coefficients(
        timesteps, prev_timesteps, prediction_type, eta, problem.batch, problem.device
    )
    seeds = None
    if eta > 0 or noise is not None:
        seeds, noise = _noise_source(problem, seed, noise)
    tensors = model_output, unconditional_output, sample, noise, coefficients, seeds
    return _run_step(
        implementation, problem, schedule, timesteps, tensors, guidance_scale, clip_range
    )


def _check(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    if len(shape) == 0:
        raise ValueError("shape must be (batch, ...) with at least the batch dimension, got ()")
    checks.check_floating("dtype", dtype)
    return Problem(tuple(shape), dtype, device)


_resolve = resolver("diffusion", _check)


def _resolve_tensor(name: str, tensor: Tensor, backend: str | None) -> Resolved:
    checks.check_tensor(name, tensor)
    checks.check_floating(name, tensor.dtype)
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have shape (batch, ...), got a scalar")
    return _resolve(backend, (), tensor.shape, tensor.dtype, tensor.device)


def _run(
    operator: Operator,
    function: type[Function] | None,
    implementation: Implementation,
    problem: Problem,
    *tensors: Tensor | None,
) -> Tensor:
    """One operator: through torch's dispatcher when traced, with an autograd node when one is
    needed.
    """
    if traced(*tensors):
        return operator.from_graph(implementation, problem, *tensors)
    if function is not None and needs_grad(*tensors):
        return function.apply(*tensors, problem, implementation)
    return operator(implementation, problem, *tensors)


def _check_like(name: str, tensor: Tensor, problem: Problem, of: str) -> None:
    checks.check_tensor(name, tensor)
    checks.check_shape(name, tensor.shape, problem.shape)
    checks.check_same_dtype(name, tensor.dtype, problem.dtype, of)
    checks.check_same_device(name, tensor.device, problem.device, of)


def _noise_source(
    problem: Problem, seed: Seed | None, noise: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(seeds, None) or (None, noise), whichever the caller gave."""
    if (seed is None) == (noise is None):
        given = "neither" if seed is None else "both"
        raise ValueError(f"just one of seed and noise must be given, got {given}")
    if noise is not None:
        _check_like("noise", noise, problem, "sample")
        return None, noise.contiguous()
    if isinstance(seed, torch.Generator):
        shape, dtype, device = problem[:3]
        return None, torch.randn(shape, generator=seed, dtype=dtype, device=device)
    assert seed is not None
    return sample_seeds(seed, problem.batch, problem.device), None


def _drawn(
    problem: Problem, noise: Tensor | None, seeds: Tensor | None, streams: Tensor | None
) -> Tensor:
    """The noise as a tensor."""
    if noise is not None:
        return noise
    assert seeds is not None
    return reference.randn(seeds, streams, problem.shape, problem.dtype)


def _run_step(
    implementation: Implementation,
    problem: Problem,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    tensors: tuple[Tensor | None, ...],
    guidance_scale: float | None,
    clip_range: float | None,
) -> Tensor:
    model_output, unconditional_output, sample, noise, coefficients, seeds = tensors
    assert model_output is not None
    assert sample is not None
    assert coefficients is not None
    _check_like("model_output", model_output, problem, "sample")
    if (unconditional_output is None) != (guidance_scale is None):
        given = "guidance_scale" if unconditional_output is None else "unconditional_output"
        raise ValueError(
            f"unconditional_output and guidance_scale must be given together, got only {given}"
        )
    if unconditional_output is not None:
        _check_like("unconditional_output", unconditional_output, problem, "sample")
        checks.check_finite("guidance_scale", guidance_scale)
        unconditional_output = unconditional_output.contiguous()
    if clip_range is not None:
        checks.check_finite("clip_range", clip_range)
        if clip_range <= 0:
            raise ValueError(f"clip_range must be positive, got {clip_range}")
    streams = None
    if seeds is not None:
        high = schedule.num_timesteps - 1
        streams = 1 + timestep_vector(
            "timesteps", timesteps, problem.batch, problem.device, 0, high
        )
    options = (1.0 if guidance_scale is None else float(guidance_scale), clip_range)
    if implementation.backend == "eager":
        if seeds is not None:
            noise = _drawn(problem, noise, seeds, streams)
        return reference.step(
            model_output, unconditional_output, sample, noise, coefficients, *options
        )
    arguments = (
        model_output.contiguous(),
        unconditional_output,
        sample.contiguous(),
        noise,
        coefficients,
        seeds,
        streams,
    )
    problem = Problem(problem.shape, problem.dtype, problem.device, *options)
    function = operators.StepFunction
    return _run(operators.step, function, implementation, problem, *arguments)
