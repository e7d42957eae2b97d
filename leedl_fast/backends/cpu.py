"""The CPU backend: calls of the compiled modules, and one table row per op."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, get_num_threads

from leedl_fast.backends import Implementation
from leedl_fast.backends.arguments import contiguous, of_add_layer_norm_backward
from leedl_fast.backends.cpu_modules import entry_points, isa, reasons

MAX_HEAD_DIM = 256


def _unsupported(problem: Any) -> str | None:
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}"
    if isa() is None:
        return "; ".join(f"{name}: {reason}" for name, reason in reasons().items())
    return None


def _attention_unsupported(problem: Any) -> str | None:
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        sizes = f"{problem.head_dim} and {problem.head_dim_v}"
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {sizes}"
    return _unsupported(problem)


NORMALIZER_NUMBERS = {"softmax": 0, "relu": 1, "sigmoid": 2}  # as csrc/cpu/attention.h has them


def _attention_options(problem: Any) -> tuple[object, ...]:
    return (
        problem.softmax_scale,
        problem.window_left,
        problem.window_right,
        NORMALIZER_NUMBERS[problem.normalizer],
        problem.softcap or 0.0,
        problem.dropout_p,
        get_num_threads(),
    )


def _attention_forward(problem: Any, *tensors: Tensor | None) -> None:
    """tensors: out, lse, row_max, row_sum, q, k, v, and the other inputs."""
    entry_points.attention_forward(*tensors[:7], tensors[7:], _attention_options(problem))


def _attention_backward(problem: Any, *tensors: Tensor | None) -> None:
    """tensors: dq, dk, dv, dbias, dsinks, dout, dlse, the inputs, out, row_max, row_sum."""
    dq, dk, dv, dbias, *others = tensors
    inputs, results = tuple(others[6:-3]), others[-3:]
    entry_points.attention_backward(
        *(dq, dk, dv, dbias if problem.wants_dbias else None, *others[:6], inputs, *results),
        _attention_options(problem),
    )


def _additive_attention_forward(problem: Any, *tensors: Tensor | None) -> None:
    entry_points.additive_attention_forward(
        *tensors, problem.window_left, problem.window_right, get_num_threads()
    )


def _additive_attention_backward(problem: Any, *tensors: Tensor | None) -> None:
    entry_points.additive_attention_backward(
        *tensors, problem.window_left, problem.window_right, get_num_threads()
    )


def _add_layer_norm_forward(problem: Any, *tensors: Tensor | None) -> None:
    """tensors: normed, summed, x, residual, weight, bias, seed."""
    options = problem.eps, problem.norm == "rms", problem.dropout_p, get_num_threads()
    run = entry_points.add_layer_norm_forward
    if not run(*tensors, *options):
        run(*tensors[:2], *map(contiguous, tensors[2:]), *options)


def _add_layer_norm_backward(problem: Any, *tensors: Any) -> None:
    entry_points.add_layer_norm_backward(
        *of_add_layer_norm_backward(*tensors),
        *(problem.eps, problem.norm == "rms", get_num_threads()),
    )


def _add_layer_norm_dropout_backward(
    problem: Any, dx: Tensor, dresidual: Tensor, seed: Tensor
) -> None:
    entry_points.add_layer_norm_dropout_backward(
        dx, dresidual, seed, problem.dropout_p, get_num_threads()
    )


def _randn(problem: Any, out: Tensor, seeds: Tensor) -> None:
    entry_points.randn(out, seeds, None, get_num_threads())


def _add_noise(problem: Any, *tensors: Tensor | None) -> None:
    entry_points.add_noise(*tensors, get_num_threads())


def _loss_forward(problem: Any, *tensors: Tensor | None) -> None:
    entry_points.noise_prediction_loss_forward(*tensors, get_num_threads())


def _loss_backward(problem: Any, *tensors: Tensor | None) -> None:
    entry_points.noise_prediction_loss_backward(*tensors, get_num_threads())


def _step(problem: Any, *tensors: Tensor | None) -> None:
    guidance_scale, clip_range = problem.guidance_scale, problem.clip_range or 0.0
    entry_points.step(*tensors, guidance_scale, clip_range, get_num_threads())


def _linear_cross_entropy_forward(
    problem: Any,
    loss: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    *inputs: Tensor | None,
) -> None:
    gradients = (dhidden, dweight, dbias) if problem.wants_gradients else (None, None, None)
    _linear_cross_entropy(problem, loss, *gradients, None, *inputs)


def _linear_cross_entropy_backward(problem: Any, *tensors: Tensor | None) -> None:
    _linear_cross_entropy(problem, None, *tensors)


def _linear_cross_entropy(problem: Any, *tensors: Any) -> None:
    """tensors: loss, dhidden, dweight, dbias, dloss, hidden, weight, bias, targets."""
    loss, dhidden, dweight, dbias, dloss, hidden, weight, bias, targets = tensors
    entry_points.linear_cross_entropy(
        *(loss, dhidden, dweight, dbias if problem.has_bias else None, dloss),
        *(hidden, weight, bias, targets),
        problem.ignore_index,
        problem.reduction == "none",
        problem.reduction == "mean",
        problem.label_smoothing,
        get_num_threads(),
    )


TABLE: Mapping[str, Implementation] = {
    "attention": Implementation(
        "cpu",
        _attention_unsupported,
        {"attention_forward": _attention_forward, "attention_backward": _attention_backward},
    ),
    "additive_attention": Implementation(
        "cpu",
        _unsupported,
        {
            "additive_attention_forward": _additive_attention_forward,
            "additive_attention_backward": _additive_attention_backward,
        },
    ),
    "add_layer_norm": Implementation(
        "cpu",
        _unsupported,
        {
            "add_layer_norm_forward": _add_layer_norm_forward,
            "add_layer_norm_backward": _add_layer_norm_backward,
            "add_layer_norm_dropout_backward": _add_layer_norm_dropout_backward,
        },
    ),
    "diffusion": Implementation(
        "cpu",
        _unsupported,
        {
            "diffusion_randn": _randn,
            "diffusion_add_noise": _add_noise,
            "diffusion_noise_prediction_loss_forward": _loss_forward,
            "diffusion_noise_prediction_loss_backward": _loss_backward,
            "diffusion_step": _step,
        },
    ),
    "linear_cross_entropy": Implementation(
        "cpu",
        _unsupported,
        {
            "linear_cross_entropy_forward": _linear_cross_entropy_forward,
            "linear_cross_entropy_backward": _linear_cross_entropy_backward,
        },
    ),
}
