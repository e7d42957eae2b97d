"""A linear layer with the cross-entropy of its logits: the contract (checks, outputs, autograd)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leedl_fast import reference
from leedl_fast.backends import Implementation, table
from leedl_fast.ops import checks
from leedl_fast.ops.checks import Kind
from leedl_fast.ops.contract import (
    Function,
    Operator,
    needs_grad,
    reference_gradients,
    resolver,
)
from leedl_fast.ops.heads import last_contiguous

REDUCTIONS = ("mean", "sum", "none")
IGNORED = -100  # torch's number for a target that no loss counts


class Problem(NamedTuple):
    """Sizes and options of one call.

    wants_gradients: the forward kernel makes the gradients too, for a dloss of 1. Never so for
    reduction="none", where dloss differs from row to row. in_graph: gradients that are not wanted
    are empty tensors, for an operator of a graph returns nothing else; they are None otherwise.
    """

    rows: int
    in_features: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    has_bias: bool
    ignore_index: int
    reduction: str
    label_smoothing: float
    wants_gradients: bool
    in_graph: bool = False

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """F.cross_entropy(F.linear(hidden, weight, bias), targets) without ever holding all logits.

    The semantics are torch's; the formulas stand in `leedl_fast/reference/linear_cross_entropy.py`.

    Args:
        hidden: (..., in_features), float32, float64, bfloat16 or float16.
        weight: (vocab_size, in_features), the dtype and device of hidden.
        targets: (...), int64: the right class of each row, 0 to vocab_size - 1, or ignore_index.
            Other values are an error where the CPU can see them; on a GPU, and in compiled code,
            they make the loss NaN.
        bias: (vocab_size,), or None.
        ignore_index: rows with this target have no loss and no gradient.
        reduction: "mean" over the rows that are not ignored (NaN where all are), "sum", or "none".
        label_smoothing: in [0, 1]: the share of the target distribution that is uniform.
        backend: "cpu", "triton" or "eager"; by default the fastest that takes the problem.

    Returns:
        The loss in the dtype of hidden: a scalar, or (...) for reduction="none". Differentiable in
        hidden, weight and bias, any number of times.

    For "mean" and "sum", where a gradient is wanted, the forward pass makes it, and the backward
    pass only multiplies it by the loss's own gradient; "none" makes the logits again. Logits,
    softmax and every sum are made in float32 (float64 for float64 inputs); where the processor
    multiplies bfloat16 numbers the gradient of bfloat16 logits is one too. Under torch.autocast
    hidden, weight and bias are promoted to the wider dtype of the first two, as torch does for
    operators of several tensors: what a linear layer made in bfloat16 meets a weight in float32.

    Raises:
        ValueError: a shape, a value or a device is wrong. TypeError: a dtype or a type is wrong.
        NotImplementedError: the backend that was asked for cannot run the problem.
    """
    if isinstance(hidden, Tensor) and torch.is_autocast_enabled(hidden.device.type):
        hidden, weight, bias = _promote(hidden, weight, bias)
    wants_gradients = needs_grad(hidden, weight, bias)
    problem, implementation, is_traced = _resolve(
        backend,
        (hidden, weight, targets, bias),
        ignore_index,
        reduction,
        label_smoothing,
        wants_gradients,
    )
    shape = targets.shape
    hidden, targets = hidden.reshape(problem.rows, problem.in_features), targets.flatten()
    _check_targets(problem, targets)
    if implementation.backend == "eager":
        loss = _reference(problem, hidden, weight, bias, targets)
    else:
        bias = None if bias is None else bias.contiguous()
        tensors = last_contiguous(hidden), last_contiguous(weight), bias, targets.contiguous()
        if is_traced:
            loss = _forward.from_graph(implementation, problem, *tensors)[0]
        elif wants_gradients:
            loss = LinearCrossEntropyFunction.apply(*tensors, problem, implementation)
        else:
            loss = _forward(implementation, problem, *tensors)[0]
    return loss.view(shape) if reduction == "none" else loss


def _promote(*tensors: Any) -> tuple[Any, ...]:
    """All in the widest dtype of the first two; what is no tensor stays, for the checks to name."""
    hidden, weight = tensors[:2]
    if not isinstance(weight, Tensor):
        return tensors
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in tensors)


def _check(
    hidden: Kind,
    weight: Kind,
    targets: Kind,
    bias: Kind | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    wants_gradients: bool,
) -> Problem:
    shape, dtype, device = hidden
    checks.check_floating("hidden", dtype)
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(
            f"hidden must have a last dimension of at least 1, got shape {tuple(shape)}"
        )
    in_features = shape[-1]
    if len(weight[0]) != 2 or weight[0][0] == 0 or weight[0][1] != in_features:
        raise ValueError(
            f"weight must have shape (vocab_size >= 1, {in_features}), got {tuple(weight[0])}"
        )
    vocab_size = weight[0][0]
    checks.check_shape("targets", targets[0], shape[:-1])
    if targets[1] != torch.int64:
        raise TypeError(f"targets must be int64, got {targets[1]}")
    checks.check_same_device("targets", targets[2], device, "hidden")
    if bias is not None:
        checks.check_shape("bias", bias[0], (vocab_size,))
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None:
            checks.check_same_dtype(name, given[1], dtype, "hidden")
            checks.check_same_device(name, given[2], device, "hidden")
    checks.check_int("ignore_index", ignore_index)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_finite("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    return Problem(
        *(shape[:-1].numel(), in_features, vocab_size, dtype, device, bias is not None),
        *(ignore_index, reduction, float(label_smoothing)),
        wants_gradients and reduction != "none",
    )


_resolve = resolver("linear_cross_entropy", _check, "hidden", "weight", "targets", "bias?")


def _check_targets(problem: Problem, targets: Tensor) -> None:
    """Read only where that costs no device synchronisation."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or targets.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(targets))
    if smallest >= 0 and largest < problem.vocab_size:
        return  # for a fifth of what the masks below cost
    ignored = targets == problem.ignore_index
    wrong = ((targets < 0) | (targets >= problem.vocab_size)) & ~ignored
    if wrong.any():
        raise ValueError(
            f"targets must lie in [0, {problem.vocab_size - 1}] or be ignore_index = "
            f"{problem.ignore_index}, got {int(targets[wrong][0])}"
        )


def _reference(
    problem: Problem, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    return reference.linear_cross_entropy(
        hidden,
        weight,
        bias,
        targets,
        ignore_index=problem.ignore_index,
        reduction=problem.reduction,
        label_smoothing=problem.label_smoothing,
    )


def _allocate_forward(problem: Problem, hidden: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    """The loss, then dhidden, dweight and dbias for a dloss of 1 where they are wanted.

    The gradients are of the statistics' dtype: a loss scale that comes with dloss can still save
    what float16 would have rounded to zero.
    """
    loss = hidden.new_empty(problem.rows if problem.reduction == "none" else ())
    if not (problem.wants_gradients or problem.in_graph):
        return loss, None, None, None
    return loss, *_allocate_gradients(problem, hidden, problem.wants_gradients)


def _allocate_gradients(
    problem: Problem, hidden: Tensor, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab_size = (problem.rows, problem.vocab_size) if wanted else (0, 0)
    dtype = problem.statistics_dtype
    return (
        hidden.new_empty(rows, problem.in_features, dtype=dtype),
        hidden.new_empty(vocab_size, problem.in_features, dtype=dtype),
        hidden.new_empty(vocab_size if problem.has_bias else 0, dtype=dtype),
    )


def _allocate_backward(
    problem: Problem, dloss: Tensor, hidden: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_gradients(problem, hidden, True)


def _describe(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any
) -> Problem:
    sizes = hidden.shape[0], hidden.shape[1], weight.shape[0]
    problem = Problem(*sizes, hidden.dtype, hidden.device, bias is not None, *options)
    return problem._replace(in_graph=True)


def _options(problem: Problem) -> tuple:
    return (
        problem.ignore_index,
        problem.reduction,
        problem.label_smoothing,
        problem.wants_gradients,
    )


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_OPTIONS = (
    "int ignore_index, str reduction, float label_smoothing, bool wants_gradients, str backend"
)

_forward = Operator(
    "linear_cross_entropy",
    "linear_cross_entropy_forward",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    4,
    allocate=_allocate_forward,
    describe=_describe,
    options=_options,
)
_backward = Operator(  # for reduction="none"
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    f"(Tensor dloss, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    5,
    allocate=_allocate_backward,
    describe=lambda dloss, *values: _describe(*values),
    options=_options,
)


def _gradients(ctx: Any, run: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias."""
    hidden, weight, bias, targets, *gradients = ctx.saved_tensors
    problem = ctx.problem
    if torch.is_grad_enabled():
        return reference_gradients(
            lambda hidden, weight, bias: (_reference(problem, hidden, weight, bias, targets),),
            (hidden, weight, bias),
            (dloss,),
        )
    if problem.reduction == "none":
        inputs = hidden, weight, bias, targets
        gradients = run(ctx.implementation, problem, dloss.contiguous(), *inputs)
    elif not (run is _backward and _is_one_on_cpu(dloss) and problem.dtype.itemsize == 2):
        gradients = [gradient * dloss.to(problem.statistics_dtype) for gradient in gradients]
    dhidden, dweight, dbias = (gradient.to(problem.dtype) for gradient in gradients)
    return dhidden, dweight, dbias if problem.has_bias else None


def _is_one_on_cpu(dloss: Tensor) -> bool:
    """So it is when loss.backward() starts here: nothing is left to do but to round a copy."""
    return dloss.device.type == "cpu" and dloss.item() == 1


class LinearCrossEntropyFunction(Function):
    """The autograd node of eager mode; its backward is differentiable through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        problem: Problem,
        implementation: Implementation,
    ) -> Tensor:
        inputs = hidden, weight, bias, targets
        loss, *gradients = _forward(implementation, problem, *inputs)
        ctx.save_for_backward(*inputs, *gradients)
        ctx.problem, ctx.implementation = problem, implementation
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple:
        return *_gradients(ctx, _backward, dloss), None, None, None


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *values, backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*values[:4], *output[1:])
    ctx.problem = _describe(*values)
    ctx.implementation = table(backend)["linear_cross_entropy"]


def _backward_from_graph(ctx: Any, dloss: Tensor, *_: None) -> tuple:
    return *_gradients(ctx, _backward.from_graph, dloss), *(None,) * 6


_forward.register_autograd(_setup_context, _backward_from_graph)
