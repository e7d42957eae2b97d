"""Residual + LayerNorm (or RMSNorm): the contract (checks, outputs, autograd)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leedl_fast import reference
from leedl_fast.backends import table
from leedl_fast.ops import checks
from leedl_fast.ops.checks import Kind
from leedl_fast.ops.contract import (
    Function,
    Operator,
    Resolved,
    needs_grad,
    reference_gradients,
    resolver,
)
from leedl_fast.ops.seeds import check_dropout_p, dropout_seed

NORMS = ("layer", "rms")


class Problem(NamedTuple):
    """Sizes and options of one call: `rows` rows of `n` numbers.

    dtype: of x and normed. residual_dtype: of residual and summed. parameter_dtype: of weight and
    bias, x's where there are none.
    """

    rows: int
    n: int
    dtype: torch.dtype
    residual_dtype: torch.dtype
    parameter_dtype: torch.dtype
    device: torch.device
    eps: float
    norm: str
    dropout_p: float


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    norm: str = "layer",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """summed = dropout(x) + residual; normed = (summed - mean) / sqrt(var + eps) * weight + bias.

    Ba et al. 2016, equation 4 (norm="layer"); Zhang and Sennrich 2019, equation 4 (norm="rms": no
    mean, and var is the mean square). Post-norm layers go on with `normed`; pre-norm layers feed
    `normed` to the next sublayer and hand `summed` to its residual connection.

    Args:
        x: (..., n), float32, float64, bfloat16 or float16: the output of a sublayer.
        residual: the shape and device of x: the input of that sublayer. The dtype of x, or float32
            beside a bfloat16 or float16 x: a residual stream that does not lose small branches.
        weight: (n,), the scale, or None for 1; the dtype of x, or float32 beside such an x.
        bias: (n,), the shift, or None for 0; the dtype of weight, or what weight's may be.
        eps: added to the variance; finite and not negative.
        norm: "layer" or "rms".
        dropout_p: in [0, 1): the probability that an element of x counts as 0; the others are
            divided by 1 - dropout_p. The backward pass makes the mask again.
        seed: of the mask: an int, or an int64 tensor of one element; None draws one from torch's
            default generator. One seed gives one mask on every backend. Not read for dropout_p=0.
        out: (normed, summed) to fill, contiguous; only where no gradient is wanted.
        backend: "cpu", "triton", "cuda" or "eager"; by default the fastest that takes the problem.

    Returns:
        (normed, summed), both of the shape of x, normed in the dtype of x and summed in that of
        residual; both differentiable any number of times.

    Everything is computed in float32 (float64 for float64), so are mean, variance and the sums for
    the gradients of weight and bias, which are added in an order that the sizes alone decide.

    Raises:
        ValueError: a shape, a value or a device is wrong. TypeError: a dtype or a type is wrong.
        NotImplementedError: the backend that was asked for cannot run the problem.
    """
    resolved = _resolve(backend, (x, residual, weight, bias), eps, norm, dropout_p)
    problem, implementation, is_traced = resolved
    mask_seed = dropout_seed(seed, x.device) if dropout_p else None
    if out is not None:
        return _fill(out, resolved, x, residual, weight, bias, mask_seed)
    if implementation.backend == "eager":
        return _reference(problem, x, residual, weight, bias, mask_seed)
    if is_traced:
        return _forward.from_graph(implementation, problem, x, residual, weight, bias, mask_seed)
    if needs_grad(x, residual, weight, bias):
        return AddLayerNormFunction.apply(x, residual, weight, bias, mask_seed, resolved)
    return _forward(implementation, problem, x, residual, weight, bias, mask_seed)


def _fill(
    out: tuple[Tensor, Tensor],
    resolved: Resolved,
    x: Tensor,
    residual: Tensor,
    *parameters: Tensor | None,
) -> tuple[Tensor, Tensor]:
    problem, implementation, is_traced = resolved
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"out must be a tuple (normed, summed), got {type(out).__name__}")
    for name, given, like in (("out[0]", out[0], x), ("out[1]", out[1], residual)):
        checks.check_tensor(name, given)
        checks.check_shape(name, given.shape, x.shape)
        checks.check_same_dtype(name, given.dtype, like.dtype, "x" if like is x else "residual")
        checks.check_same_device(name, given.device, x.device, "x")
        if not given.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {given.stride()}")
    if needs_grad(x, residual, *parameters[:2], *out):
        raise ValueError("out must be None where a gradient is wanted; torch.no_grad() wants none")
    if implementation.backend == "eager":
        results = _reference(problem, x, residual, *parameters)
    elif is_traced:
        results = _forward.from_graph(implementation, problem, x, residual, *parameters)
    else:
        kernel = implementation.kernels["add_layer_norm_forward"]
        kernel(problem, *out, x, residual, *parameters)
        return out
    for to, result in zip(out, results, strict=True):
        to.copy_(result)
    return out


def _reference(
    problem: Problem,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return reference.add_layer_norm(
        x,
        residual,
        weight,
        bias,
        eps=problem.eps,
        norm=problem.norm,
        dropout_p=problem.dropout_p,
        seed=seed,
    )


def _check(
    x: Kind,
    residual: Kind,
    weight: Kind | None,
    bias: Kind | None,
    eps: float,
    norm: str,
    dropout_p: float,
) -> Problem:
    shape, dtype, device = x
    checks.check_floating("x", dtype)
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(shape)}")
    for name, expected, given in (
        ("residual", shape, residual),
        ("weight", shape[-1:], weight),
        ("bias", shape[-1:], bias),
    ):
        if given is not None:
            checks.check_shape(name, given.shape, expected)
            if dtype.itemsize > 2 or given.dtype != torch.float32:
                checks.check_same_dtype(name, given.dtype, dtype, "x")
            checks.check_same_device(name, given.device, device, "x")
    checks.check_finite("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    checks.check_choice("norm", norm, NORMS)
    check_dropout_p(dropout_p)
    if weight is not None and bias is not None:
        checks.check_same_dtype("bias", bias.dtype, weight.dtype, "weight")
    return Problem(
        *(shape[:-1].numel(), shape[-1], dtype, residual.dtype),
        (weight or bias or x).dtype,
        *(device, float(eps), norm, float(dropout_p)),
    )


_resolve = resolver("add_layer_norm", _check, "x", "residual", "weight?", "bias?")


def _allocate_forward(
    problem: Problem, x: Tensor, residual: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor]:
    normed = torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
    if not residual.is_contiguous():
        return normed, residual.new_empty(residual.shape)
    return normed, torch.empty_like(residual)  # the cheaper call


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
        summed.new_empty(0) if weight is None else torch.empty_like(weight),
        summed.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _allocate_dropout_backward(problem: Problem, dresidual: Tensor, seed: Tensor) -> tuple[Tensor]:
    return (dresidual.new_empty(dresidual.shape, dtype=problem.dtype),)


def _describe(
    dtype: torch.dtype,
    summed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    dropout_p: float = 0.0,
) -> Problem:
    parameter = bias if weight is None else weight
    return Problem(
        *(summed.shape[:-1].numel(), summed.shape[-1], dtype, summed.dtype),
        dtype if parameter is None else parameter.dtype,
        *(summed.device, eps, norm, dropout_p),
    )


_forward = Operator(
    "add_layer_norm",
    "add_layer_norm_forward",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps, str norm, "
    "float dropout_p, str backend) -> (Tensor, Tensor)",
    5,
    allocate=_allocate_forward,
    describe=lambda x, residual, weight, bias, seed, *options: _describe(
        x.dtype, residual, weight, bias, *options
    ),
    options=lambda problem: (problem.eps, problem.norm, problem.dropout_p),
)
_backward = Operator(
    "add_layer_norm",
    "add_layer_norm_backward",
    "(Tensor dnormed, Tensor? dsummed, Tensor summed, Tensor? weight, Tensor? bias, float eps, "
    "str norm, str backend) -> (Tensor, Tensor, Tensor)",
    5,
    allocate=_allocate_backward,
    describe=lambda dnormed, dsummed, summed, weight, bias, *options: _describe(
        dnormed.dtype, summed, weight, bias, *options
    ),
    options=lambda problem: (problem.eps, problem.norm),
)
_dropout_backward = Operator(
    "add_layer_norm",
    "add_layer_norm_dropout_backward",
    "(Tensor dresidual, Tensor seed, ScalarType dtype, float dropout_p, str backend) -> Tensor",
    2,
    allocate=_allocate_dropout_backward,
    describe=lambda dresidual, seed, dtype, dropout_p: _describe(
        dtype, dresidual, None, None, 0.0, "layer", dropout_p
    ),
    options=lambda problem: (problem.dtype, problem.dropout_p),
)


def _gradients(
    ctx: Any, run: Any, run_dropout: Any, dnormed: Tensor | None, dsummed: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of x, residual, weight and bias."""
    summed, weight, bias, seed = ctx.saved_tensors
    problem, implementation, _ = ctx.resolved
    dresidual, dweight, dbias = dsummed, None, None
    if dnormed is not None and torch.is_grad_enabled():
        # summed is an output of this node, hence a function of x and residual that autograd knows.
        dresidual, dweight, dbias = reference_gradients(
            lambda summed, weight, bias: reference.add_layer_norm(
                torch.zeros_like(summed, dtype=problem.dtype),
                summed,
                weight,
                bias,
                eps=problem.eps,
                norm=problem.norm,
            ),
            (summed, weight, bias),
            (dnormed, dsummed),
        )
    elif dnormed is not None:
        dresidual, dweight, dbias = run(
            implementation,
            problem,
            dnormed.contiguous(),
            None if dsummed is None else dsummed.contiguous(),
            summed,
            weight,
            bias,
        )
        dweight = None if weight is None else dweight
        dbias = None if bias is None else dbias
    dx = dresidual
    if dresidual is not None and seed is not None:
        if torch.is_grad_enabled():
            dx = reference.add_layer_norm_dropout(dresidual, problem.dropout_p, seed)
        else:
            dx = run_dropout(implementation, problem, dresidual.contiguous(), seed)
    if dx is not None and dx.dtype != problem.dtype:
        dx = dx.to(problem.dtype)
    return dx, dresidual, dweight, dbias


class AddLayerNormFunction(Function):
    """The autograd node of eager mode; its backward is differentiable through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        resolved: Resolved,
    ) -> tuple[Tensor, Tensor]:
        problem, implementation, _ = resolved
        # What _forward does, without its loops over arguments: they cost as much as a small kernel.
        normed, summed = _forward.allocate(problem, x, residual)
        kernel = implementation.kernels["add_layer_norm_forward"]
        kernel(problem, normed, summed, x, residual, weight, bias, seed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(summed, weight, bias, seed)
        ctx.resolved = resolved
        return normed, summed

    @staticmethod
    def backward(ctx: Any, dnormed: Tensor | None, dsummed: Tensor | None) -> tuple:
        gradients = _gradients(ctx, _backward, _dropout_backward, dnormed, dsummed)
        return *gradients, None, None


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, seed, *options, backend = inputs
    _, summed = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(summed, weight, bias, seed)
    problem = _describe(x.dtype, summed, weight, bias, *options)
    ctx.resolved = Resolved(problem, table(backend)["add_layer_norm"], traced=True)


def _backward_from_graph(ctx: Any, dnormed: Tensor | None, dsummed: Tensor | None) -> tuple:
    operators = _backward.from_graph, _dropout_backward.from_graph
    return *_gradients(ctx, *operators, dnormed, dsummed), *(None,) * 5


_forward.register_autograd(_setup_context, _backward_from_graph)
