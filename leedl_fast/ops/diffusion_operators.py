"""The operators under the functions of leedl_fast.ops.diffusion: their outputs and gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leedl_fast.backends import Implementation, table
from leedl_fast.ops.contract import Function, Operator
from leedl_fast.reference import diffusion as reference


class Problem(NamedTuple):
    """`batch` samples of n numbers each; guidance_scale and clip_range are a step's alone."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    guidance_scale: float = 1.0
    clip_range: float | None = None

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def n(self) -> int:
        return torch.Size(self.shape[1:]).numel()


def _describe(like: Tensor) -> Problem:
    return Problem(tuple(like.shape), like.dtype, like.device)


def _no_options(problem: Problem) -> tuple:
    return ()


def _like_first(problem: Problem, first: Tensor, *_: Any) -> tuple[Tensor]:
    return (first.new_empty(first.shape),)


randn = Operator(
    "diffusion",
    "diffusion_randn",
    "(Tensor seeds, SymInt[] shape, ScalarType dtype, str backend) -> Tensor",
    1,
    allocate=lambda problem, seeds: (seeds.new_empty(problem.shape, dtype=problem.dtype),),
    describe=lambda seeds, shape, dtype: Problem(tuple(shape), dtype, seeds.device),
    options=lambda problem: (problem.shape, problem.dtype),
)
add_noise = Operator(
    "diffusion",
    "diffusion_add_noise",
    "(Tensor sample, Tensor? noise, Tensor coefficients, Tensor? seeds, str backend) -> Tensor",
    4,
    allocate=_like_first,
    describe=lambda sample, *_: _describe(sample),
    options=_no_options,
)
loss_forward = Operator(
    "diffusion",
    "diffusion_noise_prediction_loss_forward",
    "(Tensor model_output, Tensor? sample, Tensor? noise, Tensor coefficients, Tensor? seeds, "
    "str backend) -> Tensor",
    5,
    allocate=lambda problem, model_output, *_: (
        model_output.new_empty(problem.batch, dtype=torch.float64),
    ),
    describe=lambda model_output, *_: _describe(model_output),
    options=_no_options,
)
loss_backward = Operator(
    "diffusion",
    "diffusion_noise_prediction_loss_backward",
    "(Tensor model_output, Tensor? sample, Tensor? noise, Tensor coefficients, Tensor dsums, "
    "Tensor? seeds, str backend) -> Tensor",
    6,
    allocate=_like_first,
    describe=lambda model_output, *_: _describe(model_output),
    options=_no_options,
)
step = Operator(
    "diffusion",
    "diffusion_step",
    "(Tensor model_output, Tensor? unconditional_output, Tensor sample, Tensor? noise, "
    "Tensor coefficients, Tensor? seeds, Tensor? streams, float guidance_scale, float? clip_range, "
    "str backend) -> Tensor",
    7,
    allocate=_like_first,
    describe=lambda model_output, *rest: Problem(*_describe(model_output)[:3], *rest[6:]),
    options=lambda problem: (problem.guidance_scale, problem.clip_range),
)


class AddNoiseFunction(Function):
    """noisy = c0 sample + c1 noise; the gradients are one product each, in plain PyTorch."""

    @staticmethod
    def forward(
        ctx: Any,
        sample: Tensor,
        noise: Tensor | None,
        coefficients: Tensor,
        seeds: Tensor | None,
        problem: Problem,
        implementation: Implementation,
    ) -> Tensor:
        inputs = sample, noise, coefficients, seeds
        noisy = add_noise(implementation, problem, *inputs)
        _save_coefficients(ctx, inputs, noisy)
        return noisy

    @staticmethod
    def backward(ctx: Any, dnoisy: Tensor) -> tuple:
        return *_add_noise_gradients(ctx, dnoisy), None, None


def _save_coefficients(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _add_noise_gradients(ctx: Any, dnoisy: Tensor) -> tuple:
    (coefficients,) = ctx.saved_tensors
    _, noise_needs_grad, *_ = ctx.needs_input_grad
    scale = [reference.column(coefficients, i, dnoisy).to(dnoisy.dtype) for i in range(2)]
    return scale[0] * dnoisy, scale[1] * dnoisy if noise_needs_grad else None, None, None


add_noise.register_autograd(
    _save_coefficients, lambda ctx, dnoisy: (*_add_noise_gradients(ctx, dnoisy), None)
)


class NoisePredictionLossFunction(Function):
    """sums = per-sample squared error; the backward makes the noise again, in the kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        model_output: Tensor,
        sample: Tensor | None,
        noise: Tensor | None,
        coefficients: Tensor,
        seeds: Tensor | None,
        problem: Problem,
        implementation: Implementation,
    ) -> Tensor:
        inputs = model_output, sample, noise, coefficients, seeds
        sums = loss_forward(implementation, problem, *inputs)
        _save_loss(ctx, (*inputs, implementation.backend), sums)
        return sums

    @staticmethod
    def backward(ctx: Any, dsums: Tensor) -> tuple:
        return *_loss_gradients(ctx, loss_backward, dsums), None, None


def _save_loss(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.implementation = table(backend)["diffusion"]


def _loss_gradients(ctx: Any, run: Any, dsums: Tensor) -> tuple:
    model_output, sample, noise, coefficients, seeds = ctx.saved_tensors
    problem = _describe(model_output)
    if torch.is_grad_enabled():
        if noise is None and seeds is not None:
            noise = reference.randn(seeds, None, problem.shape, problem.dtype)
        target = reference.target(model_output, sample, noise, coefficients)
        scale = dsums.to(problem.dtype).view(problem.batch, *(1,) * (model_output.dim() - 1))
        dmodel_output = 2 * scale * (model_output - target)
    else:
        tensors = model_output, sample, noise, coefficients, dsums.contiguous(), seeds
        dmodel_output = run(ctx.implementation, problem, *tensors)
    grads = [dmodel_output, None, None]
    for index in (1, 2):  # the target is c0 sample + c1 noise
        if ctx.needs_input_grad[index]:
            scale = reference.column(coefficients, index - 1, model_output).to(problem.dtype)
            grads[index] = -scale * dmodel_output
    return *grads, None, None


loss_forward.register_autograd(
    _save_loss, lambda ctx, dsums: (*_loss_gradients(ctx, loss_backward.from_graph, dsums), None)
)


class StepFunction(Function):
    """prev_sample; linear where nothing is clipped, so that the gradients need no noise."""

    @staticmethod
    def forward(
        ctx: Any,
        model_output: Tensor,
        unconditional_output: Tensor | None,
        sample: Tensor,
        noise: Tensor | None,
        coefficients: Tensor,
        seeds: Tensor | None,
        streams: Tensor | None,
        problem: Problem,
        implementation: Implementation,
    ) -> Tensor:
        inputs = (
            model_output,
            unconditional_output,
            sample,
            noise,
            coefficients,
            seeds,
            streams,
        )
        prev_sample = step(implementation, problem, *inputs)
        _save_step(ctx, (*inputs, *step.options(problem), None), prev_sample)
        return prev_sample

    @staticmethod
    def backward(ctx: Any, dprev_sample: Tensor) -> tuple:
        return *_step_gradients(ctx, dprev_sample), None, None


def _save_step(ctx: Any, inputs: tuple, output: Tensor) -> None:
    model_output, unconditional_output, sample, _, coefficients = inputs[:5]
    ctx.guidance_scale, ctx.clip_range = inputs[7:9]
    ctx.save_for_backward(model_output, unconditional_output, sample, coefficients)


def _step_gradients(ctx: Any, dprev_sample: Tensor) -> tuple:
    model_output, unconditional_output, sample, coefficients = ctx.saved_tensors
    p, q, u, w, e, s = (reference.column(coefficients, i, sample) for i in range(6))
    dx0 = u * dprev_sample
    if ctx.clip_range is not None:
        m = model_output
        if unconditional_output is not None:
            m = unconditional_output + ctx.guidance_scale * (m - unconditional_output)
        dx0 = dx0 * ((p * sample + q * m).abs() <= ctx.clip_range)
    dm = q * dx0 + e * dprev_sample
    dmodel_output, dunconditional_output = dm, None
    if unconditional_output is not None:
        dmodel_output = ctx.guidance_scale * dm
        dunconditional_output = ((1 - ctx.guidance_scale) * dm).to(sample.dtype)
    dsample = p * dx0 + w * dprev_sample
    dnoise = (s * dprev_sample).to(sample.dtype) if ctx.needs_input_grad[3] else None
    return (
        dmodel_output.to(sample.dtype),
        dunconditional_output,
        dsample.to(sample.dtype),
        dnoise,
        None,
        None,
        None,
    )


step.register_autograd(
    _save_step, lambda ctx, dprev: (*_step_gradients(ctx, dprev), None, None, None)
)
