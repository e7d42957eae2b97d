"""The Triton backend: the kernels of leedl_fast.kernels on any GPU, and one table row per op.

On CPU tensors it runs only in Triton's interpreter (TRITON_INTERPRET=1 before the first use): slow,
for tests.
"""

from collections.abc import Callable, Mapping
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from leedl_fast.backends import Implementation
from leedl_fast.backends.arguments import of_add_layer_norm_backward

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # NVIDIA's Ampere: bfloat16 and asynchronous copies


@cache
def reason() -> str | None:
    """Why Triton cannot be used at all, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


@cache
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes tensors of any device."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def _unsupported(problem: Any) -> str | None:
    if reason() is not None:
        return reason()
    if problem.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    if is_interpreted():
        return None
    if problem.device.type != "cuda":
        return (
            f"the tensors are on {problem.device}, and Triton's interpreter is off "
            "(TRITON_INTERPRET=1 turns it on)"
        )
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(problem.device)
        if capability < MIN_CAPABILITY:
            return f"needs compute capability {MIN_CAPABILITY}, got {capability}"
    return None


def _attention_unsupported(problem: Any) -> str | None:
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        sizes = f"{problem.head_dim} and {problem.head_dim_v}"
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {sizes}"
    return _unsupported(problem)


@cache
def _kernels(module: str) -> Any:
    """A module of leedl_fast.kernels, which Triton's absence would keep from being imported."""
    return import_module(f"leedl_fast.kernels.{module}")


def _guarded(find: Callable[[], Callable[..., None]]) -> Callable[..., None]:
    """What `find` finds, called with its problem's device the current one, on which Triton
    launches.
    """

    def run(problem: Any, *tensors: Tensor | None) -> None:
        kernel, device = find(), problem.device
        if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
            kernel(problem, *tensors)
        else:
            with torch.cuda.device(device):
                kernel(problem, *tensors)

    return run


def _on_its_device(kernel: Callable[..., None]) -> Callable[..., None]:
    return wraps(kernel)(_guarded(lambda: kernel))


def _kernel(module: str, name: str) -> Callable[..., None]:
    """A function of leedl_fast.kernels, as it is."""
    return _guarded(lambda: getattr(_kernels(module), name))


@_on_its_device
def _additive_attention_backward(problem: Any, *tensors: Tensor | None) -> None:
    *gradients_and_inputs, _, row_max, row_sum = tensors
    _kernels("additive_attention_backward").backward(
        problem, *gradients_and_inputs, row_max, row_sum
    )


@_on_its_device
def _add_layer_norm_backward(problem: Any, *tensors: Any) -> None:
    _kernels("add_layer_norm_backward").backward(problem, *of_add_layer_norm_backward(*tensors))


@_on_its_device
def _linear_cross_entropy_forward(
    problem: Any,
    loss: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
) -> None:
    gradients = (dhidden, dweight, dbias) if problem.wants_gradients else (None, None, None)
    losses = torch.empty(problem.rows, dtype=torch.float32, device=problem.device)
    dlosses = torch.ones_like(losses)
    if problem.reduction == "mean":  # the number of rows stays on the device
        dlosses /= (targets != problem.ignore_index).sum()
    _linear_cross_entropy(problem, losses, *gradients, dlosses, hidden, weight, bias, targets)
    if problem.reduction == "none":
        loss.copy_(losses)
    elif problem.reduction == "sum":
        loss.copy_(losses.sum())
    else:
        loss.copy_(losses.sum() / (targets != problem.ignore_index).sum())


@_on_its_device
def _linear_cross_entropy_backward(
    problem: Any,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dloss: Tensor,
    *inputs: Tensor | None,
) -> None:
    losses = torch.empty(problem.rows, dtype=torch.float32, device=problem.device)
    _linear_cross_entropy(problem, losses, dhidden, dweight, dbias, dloss.float(), *inputs)


def _linear_cross_entropy(problem: Any, *tensors: Any) -> None:
    """tensors: losses, dhidden, dweight, dbias, dlosses, hidden, weight, bias, targets."""
    losses, dhidden, dweight, dbias, *rest = tensors
    _kernels("linear_cross_entropy").run(
        *(losses, dhidden, dweight, dbias if problem.has_bias else None, *rest),
        ignore_index=problem.ignore_index,
        label_smoothing=problem.label_smoothing,
    )


TABLE: Mapping[str, Implementation] = {
    "attention": Implementation(
        "triton",
        _attention_unsupported,
        {
            "attention_forward": _kernel("attention", "forward"),
            "attention_backward": _kernel("attention_backward", "backward"),
        },
    ),
    "additive_attention": Implementation(
        "triton",
        _unsupported,
        {
            "additive_attention_forward": _kernel("additive_attention", "forward"),
            "additive_attention_backward": _additive_attention_backward,
        },
    ),
    "add_layer_norm": Implementation(
        "triton",
        _unsupported,
        {
            "add_layer_norm_forward": _kernel("add_layer_norm", "forward"),
            "add_layer_norm_backward": _add_layer_norm_backward,
            "add_layer_norm_dropout_backward": _kernel("add_layer_norm", "dropout_backward"),
        },
    ),
    "diffusion": Implementation(
        "triton",
        _unsupported,
        {
            "diffusion_randn": _kernel("diffusion", "randn"),
            "diffusion_add_noise": _kernel("diffusion", "add_noise"),
            "diffusion_noise_prediction_loss_forward": _kernel(
                "diffusion", "noise_prediction_loss_forward"
            ),
            "diffusion_noise_prediction_loss_backward": _kernel(
                "diffusion", "noise_prediction_loss_backward"
            ),
            "diffusion_step": _kernel("diffusion", "step"),
        },
    ),
    "linear_cross_entropy": Implementation(
        "triton",
        _unsupported,
        {
            "linear_cross_entropy_forward": _linear_cross_entropy_forward,
            "linear_cross_entropy_backward": _linear_cross_entropy_backward,
        },
    ),
}
