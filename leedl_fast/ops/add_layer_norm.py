"""Residual + LayerNorm (or RMSNorm): the contract (checks, outputs, autograd)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leedl_fast import reference
from leedl_fast.backends import Implementation, table
from leedl_fast.ops import checks
from leedl_fast.ops.contract import (
    Function,
    Operator,
    needs_grad,
    reference_gradients,
    resolver,
    traced,
)

NORMS = ("layer", "rms")


class Problem(NamedTuple):
    """Sizes and options of one call: `rows` rows of `n` numbers."""

    rows: int
    n: int
    dtype: torch.dtype
    device: torch.device
    eps: float
    norm: str


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    norm: str = "layer",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """summed = x + residual; normed = (summed - mean) / sqrt(var + eps) * weight + bias.

    Ba et al. 2016, equation 4 (norm="layer"); Zhang and Sennrich 2019, equation 4 (norm="rms": no
    mean, and var is the mean square). Post-norm layers go on with `normed`; pre-norm layers feed
    `normed` to the next sublayer and hand `summed` to its residual connection.

    Args:
        x: (..., n), float32, float64, bfloat16 or float16: the output of a sublayer.
        residual: the shape, dtype and device of x: the input of that sublayer.
        weight: (n,), the scale, or None for 1.
        bias: (n,), the shift, or None for 0.
        eps: added to the variance; finite and not negative.
        norm: "layer" or "rms".
        backend: "cpu", "triton" or "eager"; by default the fastest that takes the problem.

    Returns:
        (normed, summed), both of the shape and dtype of x, both differentiable any number of times.

    Mean, variance and the sums for the gradients of weight and bias are float32 (float64 for
    float64).

    Raises:
        ValueError: a shape, a value or a device is wrong. TypeError: a dtype or a type is wrong.
        NotImplementedError: the backend that was asked for cannot run the problem.
    """
    checks.check_tensor("x", x)
    checks.check_tensor("residual", residual)
    problem, implementation = _resolve(
        backend,
        x.shape,
        x.dtype,
        x.device,
        (residual.shape, residual.dtype, residual.device),
        None if weight is None else (weight.shape, weight.dtype, weight.device),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        eps,
        norm,
    )
    if implementation.backend == "eager":
        return reference.add_layer_norm(x, residual, weight, bias, eps=eps, norm=norm)
    if traced(x, residual, weight, bias):
        return _forward.from_graph(implementation, problem, x, residual, weight, bias)
    if needs_grad(x, residual, weight, bias):
        return AddLayerNormFunction.apply(x, residual, weight, bias, problem, implementation)
    return _forward(implementation, problem, x, residual, weight, bias)


def _check(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    residual: tuple,
    weight: tuple | None,
    bias: tuple | None,
    eps: float,
    norm: str,
) -> Problem:
    checks.check_floating("x", dtype)
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(shape)}")
    for name, given, expected in (
        ("residual", residual, shape),
        ("weight", weight, shape[-1:]),
        ("bias", bias, shape[-1:]),
    ):
        if given is not None:
            checks.check_shape(name, given[0], expected)
            checks.check_same_dtype(name, given[1], dtype, "x")
            checks.check_same_device(name, given[2], device, "x")
    checks.check_finite("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    checks.check_choice("norm", norm, NORMS)
    return Problem(shape[:-1].numel(), shape[-1], dtype, device, float(eps), norm)


_resolve = resolver("add_layer_norm", _check)


def _allocate_forward(
    problem: Problem, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not x.is_contiguous():
        return x.new_empty(x.shape), x.new_empty(x.shape)
    return torch.empty_like(x), torch.empty_like(x)  # the cheaper call


def _allocate_backward(
    problem: Problem,
    dnormed: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        summed.new_empty(summed.shape),
        summed.new_empty(0 if weight is None else problem.n),
        summed.new_empty(0 if bias is None else problem.n),
    )


def _describe(x: Tensor, eps: float, norm: str) -> Problem:
    return Problem(x.shape[:-1].numel(), x.shape[-1], x.dtype, x.device, eps, norm)


def _options(problem: Problem) -> tuple:
    return problem.eps, problem.norm


_forward = Operator(
    "add_layer_norm",
    "add_layer_norm_forward",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, str norm, str backend) "
    "-> (Tensor, Tensor)",
    4,
    allocate=_allocate_forward,
    describe=lambda x, residual, weight, bias, *options: _describe(x, *options),
    options=_options,
)
_backward = Operator(
    "add_layer_norm",
    "add_layer_norm_backward",
    "(Tensor dnormed, Tensor? dsummed, Tensor summed, Tensor? weight, Tensor? bias, float eps, "
    "str norm, str backend) -> (Tensor, Tensor, Tensor)",
    5,
    allocate=_allocate_backward,
    describe=lambda dnormed, dsummed, summed, weight, bias, *options: _describe(summed, *options),
    options=_options,
)


def _gradients(
    ctx: Any, run: Any, dnormed: Tensor | None, dsummed: Tensor | None
) -> tuple[Tensor | None, ...]:
    summed, weight, bias = ctx.saved_tensors
    if dnormed is None:
        return dsummed, dsummed, None, None
    if torch.is_grad_enabled():
        # summed is an output of this node, hence a function of x and residual that autograd knows.
        dx, dweight, dbias = reference_gradients(
            lambda summed, weight, bias: reference.add_layer_norm(
                summed,
                torch.zeros_like(summed),
                weight,
                bias,
                eps=ctx.problem.eps,
                norm=ctx.problem.norm,
            ),
            (summed, weight, bias),
            (dnormed, dsummed),
        )
        return dx, dx, dweight, dbias
    dx, dweight, dbias = run(
        ctx.implementation,
        ctx.problem,
        dnormed.contiguous(),
        None if dsummed is None else dsummed.contiguous(),
        summed,
        weight,
        bias,
    )
    return dx, dx, None if weight is None else dweight, None if bias is None else dbias


class AddLayerNormFunction(Function):
    """The autograd node of eager mode; its backward is differentiable through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        problem: Problem,
        implementation: Implementation,
    ) -> tuple[Tensor, Tensor]:
        normed, summed = _forward(implementation, problem, x, residual, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(summed, weight, bias)
        ctx.problem, ctx.implementation = problem, implementation
        return normed, summed

    @staticmethod
    def backward(ctx: Any, dnormed: Tensor | None, dsummed: Tensor | None) -> tuple:
        return *_gradients(ctx, _backward, dnormed, dsummed), None, None


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, *options, backend = inputs
    _, summed = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(summed, weight, bias)
    ctx.problem = _describe(x, *options)
    ctx.implementation = table(backend)["add_layer_norm"]


def _backward_from_graph(ctx: Any, dnormed: Tensor | None, dsummed: Tensor | None) -> tuple:
    grads = _gradients(ctx, _backward.from_graph, dnormed, dsummed)
    return *grads, None, None, None


_forward.register_autograd(_setup_context, _backward_from_graph)
