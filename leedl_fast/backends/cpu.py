"""The CPU backend: calls of the compiled modules, and one table row per op."""

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, get_num_threads

from leedl_fast.backends import Implementation
from leedl_fast.backends.cpu_modules import entry_points, isa, reasons

MAX_HEAD_DIM = 256

# As csrc/cpu/dtypes.h has them: the kernels' first argument.
DTYPE_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


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


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """The strides of (batch, head, seqlen) of each tensor, one after another."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


NORMALIZER_NUMBERS = {"softmax": 0, "relu": 1, "sigmoid": 2}  # as csrc/cpu/attention.h has them


def _broadcast_strides(tensor: Tensor | None) -> tuple[int, ...]:
    """The strides of (batch, head, query), 0 where one row serves all."""
    if tensor is None or tensor.dim() != 4:
        return (0, 0, 0)
    sizes_and_strides = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return tuple(0 if size == 1 else stride for size, stride in sizes_and_strides)


def _attention_options(
    problem: Any, bias: Tensor | None, alibi_slopes: Tensor | None
) -> tuple[object, ...]:
    by_sample = alibi_slopes is not None and alibi_slopes.dim() == 2
    return (
        get_num_threads(),
        problem.num_sequences or 0,
        problem.softmax_scale,
        problem.window_left,
        problem.window_right,
        NORMALIZER_NUMBERS[problem.normalizer],
        problem.softcap or 0.0,
        problem.dropout_p,
        _broadcast_strides(bias),
        problem.num_heads if by_sample else 0,
    )


def _attention_forward(
    problem: Any,
    out: Tensor,
    lse: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    *others: Tensor | None,  # key_lengths, cu_seqlens_q, cu_seqlens_k, seed
) -> None:
    entry_points.attention_forward(
        DTYPE_NUMBERS[problem.dtype],
        *map(_pointer, (out, lse, row_max, row_sum, q, k, v)),
        tuple(map(_pointer, (bias, sinks, alibi_slopes, *others))),
        problem[:7],
        _strides(out, q, k, v),
        _attention_options(problem, bias, alibi_slopes),
    )


def _attention_backward(
    problem: Any,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor,
    dsinks: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
) -> None:
    others = (key_lengths, cu_seqlens_q, cu_seqlens_k, seed)
    wanted_dbias = dbias if problem.wants_dbias else None
    entry_points.attention_backward(
        DTYPE_NUMBERS[problem.dtype],
        *map(_pointer, (dq, dk, dv, wanted_dbias, dsinks, dout, dlse, q, k, v)),
        *map(_pointer, (out, row_max, row_sum)),
        tuple(map(_pointer, (bias, sinks, alibi_slopes, *others))),
        problem[:7],
        _strides(dq, dk, dv, dout, q, k, v, out),
        (*_broadcast_strides(wanted_dbias), dbias.numel()),
        _attention_options(problem, bias, alibi_slopes),
    )


def _additive_attention_forward(
    problem: Any,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_weight: Tensor,
    key_lengths: Tensor | None,
) -> None:
    entry_points.additive_attention_forward(
        DTYPE_NUMBERS[problem.dtype],
        *map(_pointer, (out, row_max, row_sum, q, k, v, score_weight, key_lengths)),
        problem[:7],
        _strides(out, q, k, v),
        problem.window_left,
        problem.window_right,
        get_num_threads(),
    )


def _additive_attention_backward(
    problem: Any,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dscore_weight: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_weight: Tensor,
    key_lengths: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
) -> None:
    entry_points.additive_attention_backward(
        DTYPE_NUMBERS[problem.dtype],
        *map(_pointer, (dq, dk, dv, dscore_weight, dout, q, k, v, score_weight, key_lengths)),
        *map(_pointer, (out, row_max, row_sum)),
        problem[:7],
        _strides(dq, dk, dv, dout, q, k, v, out),
        problem.window_left,
        problem.window_right,
        get_num_threads(),
    )


def _add_layer_norm_forward(
    problem: Any,
    normed: Tensor,
    summed: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
) -> None:
    options = problem.eps, problem.norm == "rms", problem.dropout_p, get_num_threads()
    run = entry_points.add_layer_norm_forward
    if not run(normed, summed, x, residual, weight, bias, seed, *options):
        x, residual = x.contiguous(), residual.contiguous()
        weight = None if weight is None else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        run(normed, summed, x, residual, weight, bias, seed, *options)


def _add_layer_norm_backward(
    problem: Any,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dnormed: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    entry_points.add_layer_norm_backward(
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        *(dnormed, dsummed, summed, weight if weight is None else weight.contiguous()),
        problem.eps,
        problem.norm == "rms",
        get_num_threads(),
    )


def _add_layer_norm_dropout_backward(
    problem: Any, dx: Tensor, dresidual: Tensor, seed: Tensor
) -> None:
    entry_points.add_layer_norm_dropout_backward(
        dx, dresidual, seed, problem.dropout_p, get_num_threads()
    )


def _randn(problem: Any, out: Tensor, seeds: Tensor) -> None:
    entry_points.randn(
        DTYPE_NUMBERS[problem.dtype],
        out.data_ptr(),
        seeds.data_ptr(),
        0,
        problem.batch,
        problem.n,
        get_num_threads(),
    )


def _add_noise(
    problem: Any,
    noisy: Tensor,
    sample: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
    seeds: Tensor | None,
) -> None:
    entry_points.add_noise(
        DTYPE_NUMBERS[problem.dtype],
        *map(_pointer, (noisy, sample, noise, coefficients, seeds)),
        problem.batch,
        problem.n,
        get_num_threads(),
    )


def _loss_forward(
    problem: Any,
    sums: Tensor,
    model_output: Tensor,
    sample: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    seeds: Tensor | None,
) -> None:
    entry_points.noise_prediction_loss_forward(
        DTYPE_NUMBERS[problem.dtype],
        *map(_pointer, (sums, model_output, sample, noise, coefficients, seeds)),
        problem.batch,
        problem.n,
        get_num_threads(),
    )


def _loss_backward(
    problem: Any,
    dmodel_output: Tensor,
    model_output: Tensor,
    sample: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    dsums: Tensor,
    seeds: Tensor | None,
) -> None:
    entry_points.noise_prediction_loss_backward(
        DTYPE_NUMBERS[problem.dtype],
        *map(_pointer, (dmodel_output, model_output, sample, noise, coefficients, dsums, seeds)),
        problem.batch,
        problem.n,
        get_num_threads(),
    )


def _step(
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
    entry_points.step(
        DTYPE_NUMBERS[problem.dtype],
        *map(_pointer, (prev_sample, model_output, unconditional_output, sample, noise)),
        coefficients.data_ptr(),
        problem.guidance_scale,
        problem.clip_range or 0.0,
        *map(_pointer, (seeds, streams)),
        problem.batch,
        problem.n,
        get_num_threads(),
    )


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
        DTYPE_NUMBERS[problem.dtype],
        *map(_pointer, (loss, dhidden, dweight, dbias if problem.has_bias else None, dloss)),
        *map(_pointer, (hidden, weight, bias, targets)),
        problem.rows,
        problem.in_features,
        problem.vocab_size,
        hidden.stride(0),
        weight.stride(0),
        problem.ignore_index,
        problem.reduction == "none",
        problem.reduction == "mean",
        problem.label_smoothing,
        get_num_threads(),
    )


TABLE = MappingProxyType(
    {
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
)
