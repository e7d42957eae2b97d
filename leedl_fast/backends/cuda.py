"""The CUDA backend: calls of the compiled module on NVIDIA GPUs, and one table row per op."""

from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from leedl_fast.backends import Implementation
from leedl_fast.backends.arguments import contiguous, of_add_layer_norm_backward
from leedl_fast.backends.compiled import load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # the first of setup.py's CUDA_TARGETS


@cache
def _load() -> ModuleType | str:
    """The compiled module, or the reason why there is none."""
    return load("_cuda", "nvcc")


def reason() -> str | None:
    """Why the compiled module cannot be used at all, or None."""
    module = _load()
    return module if isinstance(module, str) else None


def _module() -> Any:
    return _load()


@cache
def _driver_error() -> str:
    """Of a driver that is older than the toolkit that built the module, for example."""
    return _module().driver_error()


def unsupported_device(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None."""
    if device.type != "cuda":
        return f"the tensors are on {device}"
    if torch.version.hip is not None:
        return "torch was built for AMD's GPUs"
    if error := _driver_error():
        return f"CUDA says {error}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"needs compute capability {MIN_CAPABILITY}, got {capability}"
    return None


def _unsupported(problem: Any) -> str | None:
    if reason() is not None:
        return reason()
    if problem.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    return unsupported_device(problem.device)


def _add_layer_norm_forward(problem: Any, *tensors: Tensor | None) -> None:
    """tensors: normed, summed, x, residual, weight, bias, seed."""
    options = problem.eps, problem.norm == "rms", problem.dropout_p
    run = _module().add_layer_norm_forward
    if not run(*tensors, *options):
        run(*tensors[:2], *map(contiguous, tensors[2:]), *options)


def _add_layer_norm_backward(problem: Any, *tensors: Any) -> None:
    # Blocks that fill a GPU, of 16 rows or more, and partial sums that its cache holds.
    parts = max(1, min(-(-problem.rows // 16), 2**21 // problem.n, 1024))
    partial = torch.empty(parts, 2, problem.n, dtype=torch.float32, device=problem.device)
    dx, dweight, dbias, *inputs = of_add_layer_norm_backward(*tensors)
    _module().add_layer_norm_backward(
        dx, dweight, dbias, partial, *inputs, problem.eps, problem.norm == "rms"
    )


def _add_layer_norm_dropout_backward(
    problem: Any, dx: Tensor, dresidual: Tensor, seed: Tensor
) -> None:
    _module().add_layer_norm_dropout_backward(dx, dresidual, seed, problem.dropout_p)


# Of attention, as csrc/cuda has them.
MAX_HEAD_DIM = 256
MAX_HEAD_DIM_BACKWARD = 128
MAX_SEQLEN = 2**29
ATTENTION_DTYPES = (torch.bfloat16, torch.float16)


def _attention_unsupported(problem: Any) -> str | None:
    if problem.dtype not in ATTENTION_DTYPES:
        return f"takes bfloat16 and float16, got {problem.dtype}"
    for name, is_asked_for in (
        (f"normalizer {problem.normalizer!r}", problem.normalizer != "softmax"),
        ("softcap", problem.softcap is not None),
        ("bias", problem.bias_shape is not None),
        ("dropout", problem.dropout_p > 0),
    ):
        if is_asked_for:
            return f"has no {name}"
    if max(problem.seqlen_q, problem.seqlen_k) > MAX_SEQLEN:
        sizes = f"{problem.seqlen_q} and {problem.seqlen_k}"
        return f"seqlen must be at most {MAX_SEQLEN}, got {sizes}"
    largest = MAX_HEAD_DIM_BACKWARD if problem.wants_statistics else MAX_HEAD_DIM
    if max(problem.head_dim, problem.head_dim_v) > largest:
        sizes = f"{problem.head_dim} and {problem.head_dim_v}"
        use = "with lse or gradients" if problem.wants_statistics else "without gradients"
        return f"head_dim must be at most {largest} {use}, got {sizes}"
    return _unsupported(problem)


def _with_aligned_rows(x: Tensor) -> Tensor:
    """x or, where one of its rows does not begin at a multiple of 16 bytes, a copy."""
    in_vector = 16 // x.element_size()
    strides = [x.stride(i) for i in range(3) if x.shape[i] > 1 or i == 2]
    if x.data_ptr() % 16 == 0 and all(stride % in_vector == 0 for stride in strides):
        return x
    columns = -(-x.shape[3] // in_vector) * in_vector
    return x.new_empty(*x.shape[:3], columns)[..., : x.shape[3]].copy_(x)


def _attention_forward(
    problem: Any,
    out: Tensor,
    lse: Tensor | None,
    base: Tensor | None,
    inverse_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: None,
    *others: Tensor | None,
) -> None:
    """others: the rest of the Inputs, the last of which, dropout's seed, is None."""
    if out.numel() == 0 and (lse is None or lse.numel() == 0):
        return
    run = _module().attention_forward
    outputs, inputs, options = (out, lse, base, inverse_sum), others[:-1], _options(problem)
    if not run(*outputs, q, k, v, inputs, options):
        run(*outputs, *map(_with_aligned_rows, (q, k, v)), inputs, options)


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
    bias: None,
    *others: Tensor | None,
) -> None:
    """others: the rest of the Inputs, out, and the statistics of the forward pass."""
    *inputs, _, out, base, inverse_sum = others
    assert out is not None
    assert base is not None
    delta = torch.empty_like(base)
    dsinks_of_rows = torch.empty_like(base) if problem.has_sinks else None
    run = _module().attention_backward
    outputs = dq, dk, dv, delta, dsinks_of_rows
    rest = dlse, base, inverse_sum, tuple(inputs), _options(problem)
    tensors = dout, out, q, k, v
    if not run(*outputs, *tensors, *rest):
        run(*outputs, *map(_with_aligned_rows, tensors), *rest)
    if dsinks_of_rows is not None:
        torch.sum(dsinks_of_rows, (0, 2), out=dsinks)


def _options(problem: Any) -> tuple[float, int, int]:
    return problem.softmax_scale, problem.window_left, problem.window_right


def _randn(problem: Any, out: Tensor, seeds: Tensor) -> None:
    _module().randn(out, seeds)


def _add_noise(problem: Any, *tensors: Tensor | None) -> None:
    _module().add_noise(*tensors)


def _loss_forward(problem: Any, sums: Tensor, *inputs: Tensor | None) -> None:
    # Blocks of so many numbers fill a GPU, and one warp adds what they make of a sample.
    parts = max(1, min(-(-problem.n // 8192), 1024))
    partial = torch.empty(problem.batch, parts, dtype=torch.float64, device=problem.device)
    _module().noise_prediction_loss_forward(sums, partial, *inputs)


def _loss_backward(problem: Any, *tensors: Tensor | None) -> None:
    _module().noise_prediction_loss_backward(*tensors)


def _step(problem: Any, *tensors: Tensor | None) -> None:
    _module().step(*tensors, problem.guidance_scale, problem.clip_range or 0.0)


TABLE: Mapping[str, Implementation] = {
    "attention": Implementation(
        "cuda",
        _attention_unsupported,
        {"attention_forward": _attention_forward, "attention_backward": _attention_backward},
    ),
    "add_layer_norm": Implementation(
        "cuda",
        _unsupported,
        {
            "add_layer_norm_forward": _add_layer_norm_forward,
            "add_layer_norm_backward": _add_layer_norm_backward,
            "add_layer_norm_dropout_backward": _add_layer_norm_dropout_backward,
        },
    ),
    "diffusion": Implementation(
        "cuda",
        _unsupported,
        {
            "diffusion_randn": _randn,
            "diffusion_add_noise": _add_noise,
            "diffusion_noise_prediction_loss_forward": _loss_forward,
            "diffusion_noise_prediction_loss_backward": _loss_backward,
            "diffusion_step": _step,
        },
    ),
}
