"""Attention: the contract (checks, outputs, autograd) of full, causal and windowed softmax
attention.
"""

import math
from typing import Any, Literal, NamedTuple, overload

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

Window = int | tuple[int | None, int | None] | None


class Problem(NamedTuple):
    """Sizes and options of one call. The window is inclusive and never unlimited: at most
    seqlen_q + seqlen_k, which reaches everything."""

    batch: int
    num_heads: int
    num_heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    softmax_scale: float
    window_left: int
    window_right: int

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: Window = ...,
    softmax_scale: float | None = ...,
    key_lengths: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: Window = ...,
    softmax_scale: float | None = ...,
    key_lengths: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    softmax_scale: float | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, softmax(softmax_scale * q k^T) v over the keys that each query
    sees.

    Vaswani et al. 2017, equation 1; truncated self-attention when a window is given.

    Args:
        q: (batch, num_heads, seqlen_q, head_dim), float32, float64, bfloat16 or float16. Any
            strides with a contiguous last dimension cost no copy: (batch, seqlen, num_heads,
            head_dim) storage, transposed, is as good.
        k: (batch, num_heads_k, seqlen_k, head_dim), the dtype and device of q. num_heads must be a
            multiple of num_heads_k: head h reads the keys of head h // (num_heads // num_heads_k).
        v: (batch, num_heads_k, seqlen_k, head_dim_v); head_dim_v may differ from head_dim.
        causal: hide the keys after the query's position (aligned bottom-right, see below).
        window: (left, right): query i sees keys i + shift - left to i + shift + right, both
            included, where shift = seqlen_k - seqlen_q. None on a side is unlimited; a number w
            alone means (w, w), or (w, 0) when causal. Negative numbers are an error.
        softmax_scale: factor on the scores; 1 / sqrt(head_dim) by default.
        key_lengths: (batch,) int64 or int32: sample b sees its first key_lengths[b] keys only. Does
            not move the diagonal. What the other keys hold is never read into a result.
        return_lse: return (out, lse) with lse (batch, num_heads, seqlen_q), the natural log of each
            query's sum of exponentials, in float32 (float64 for float64); differentiable.
        backend: "cpu", "triton" or "eager"; by default the fastest that takes the problem.

    Returns:
        out, (batch, num_heads, seqlen_q, head_dim_v), in the dtype and storage order of q.

    The causal mask for seqlen_q = 2, seqlen_k = 4 (x is seen), and window=(1, 0) beside it::

        x x x .        . x x .
        x x x x        . . x x

    A query that sees no key gives zeros and lse = -inf. Scores, softmax and every sum are made in
    float32 (float64 for float64 inputs). Differentiable any number of times.

    Raises:
        ValueError: a shape, a value or a device is wrong. TypeError: a dtype or a type is wrong.
        NotImplementedError: the backend that was asked for cannot run the problem.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(name, tensor)
    if isinstance(window, list):
        window = tuple(window)
    problem, implementation = _resolve(
        backend,
        q.shape,
        k.shape,
        v.shape,
        (q.dtype, k.dtype, v.dtype),
        (q.device, k.device, v.device),
        causal,
        window,
        softmax_scale,
    )
    if key_lengths is not None:
        checks.check_integer_vector("key_lengths", key_lengths, problem.batch, problem.device)
        checks.check_range("key_lengths", key_lengths, 0, problem.seqlen_k)
        key_lengths = key_lengths.to(torch.int64).contiguous()
    if implementation.backend == "eager":
        out, lse = _reference(problem, q, k, v, key_lengths, return_lse=return_lse)
    else:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if traced(q, k, v, key_lengths):
            out, lse, _, _ = _forward.from_graph(implementation, problem, q, k, v, key_lengths)
        elif needs_grad(q, k, v):
            out, lse = AttentionFunction.apply(q, k, v, key_lengths, problem, implementation)
        else:
            out, lse, _, _ = _forward(implementation, problem, q, k, v, key_lengths)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _check(
    q_shape: torch.Size,
    k_shape: torch.Size,
    v_shape: torch.Size,
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    causal: bool,
    window: Window,
    softmax_scale: float | None,
) -> Problem:
    for name, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)):
        if len(shape) != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, num_heads, seqlen, head_dim), "
                f"got shape {tuple(shape)}"
            )
    batch, num_heads, seqlen_q, head_dim = q_shape
    num_heads_k, seqlen_k = k_shape[1], k_shape[2]
    checks.check_floating("q", dtypes[0])
    for name, dtype, device in zip("kv", dtypes[1:], devices[1:], strict=True):
        checks.check_same_dtype(name, dtype, dtypes[0], "q")
        checks.check_same_device(name, device, devices[0], "q")
    checks.check_shape("k", k_shape, (batch, num_heads_k, seqlen_k, head_dim))
    checks.check_shape("v", v_shape, (batch, num_heads_k, seqlen_k, v_shape[3]))
    if num_heads != 0 if num_heads_k == 0 else num_heads % num_heads_k:
        raise ValueError(
            "the heads of q must be a multiple of the heads of k, "
            f"got {num_heads} heads of q and {num_heads_k} of k"
        )
    if head_dim == 0:
        raise ValueError(f"q must have head_dim >= 1, got shape {tuple(q_shape)}")
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(head_dim)
    else:
        checks.check_finite("softmax_scale", softmax_scale)
    checks.check_bool("causal", causal)
    left, right = _window_sides(window, causal, seqlen_q + seqlen_k)
    return Problem(
        batch,
        num_heads,
        num_heads_k,
        seqlen_q,
        seqlen_k,
        head_dim,
        v_shape[3],
        dtypes[0],
        devices[0],
        softmax_scale,
        left,
        right,
    )


def _window_sides(window: Window, causal: bool, unlimited: int) -> tuple[int, int]:
    if window is not None and not isinstance(window, tuple):
        checks.check_int("window", window)
        window = (window, 0 if causal else window)
    if window is not None and len(window) != 2:
        raise ValueError(f"window must be (left, right), got {window}")
    left, right = window if window is not None else (None, None)
    for side in (left, right):
        if side is not None:
            checks.check_int("window", side)
            if side < 0:
                raise ValueError(
                    f"window must not be negative (None means unlimited), got {window}"
                )
    left = unlimited if left is None else min(left, unlimited)
    right = unlimited if right is None else min(right, unlimited)
    return left, 0 if causal else right


_resolve = resolver("attention", _check)


def _reference(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    *,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    return reference.attention(
        q,
        k,
        v,
        key_lengths,
        softmax_scale=problem.softmax_scale,
        window_left=problem.window_left,
        window_right=problem.window_right,
        return_lse=return_lse,
    )


def _empty(like: Tensor, seqlen: int, head_dim: int) -> Tensor:
    """An empty (batch, num_heads, seqlen, head_dim) tensor in the storage order of `like`."""
    batch, num_heads = like.shape[:2]
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, seqlen, num_heads, head_dim).transpose(1, 2)
    return like.new_empty(batch, num_heads, seqlen, head_dim)


def _allocate_forward(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None
) -> tuple[Tensor, ...]:
    """out, lse, and the maximum and sum of each row, which the kernels keep for their backward."""
    rows = (problem.batch, problem.num_heads, problem.seqlen_q)
    statistics = [q.new_empty(rows, dtype=problem.statistics_dtype) for _ in range(3)]
    return _empty(q, problem.seqlen_q, problem.head_dim_v), *statistics


def _allocate_backward(
    problem: Problem, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _empty(q, problem.seqlen_q, problem.head_dim),
        _empty(k, problem.seqlen_k, problem.head_dim),
        _empty(v, problem.seqlen_k, problem.head_dim_v),
    )


def _describe(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, left: int, right: int
) -> Problem:
    return Problem(
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        q.shape[3],
        v.shape[3],
        q.dtype,
        q.device,
        softmax_scale,
        left,
        right,
    )


def _options(problem: Problem) -> tuple:
    return problem.softmax_scale, problem.window_left, problem.window_right


_forward = Operator(
    "attention",
    "attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_lengths, float softmax_scale, SymInt window_left, "
    "SymInt window_right, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    4,
    allocate=_allocate_forward,
    describe=lambda q, k, v, key_lengths, *options: _describe(q, k, v, *options),
    options=_options,
)
_backward = Operator(
    "attention",
    "attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? key_lengths, Tensor out, "
    "Tensor row_max, Tensor row_sum, float softmax_scale, SymInt window_left, "
    "SymInt window_right, str backend) -> (Tensor, Tensor, Tensor)",
    9,
    allocate=_allocate_backward,
    describe=lambda dout, dlse, q, k, v, key_lengths, out, row_max, row_sum, *options: _describe(
        q, k, v, *options
    ),
    options=_options,
)


def _gradients(
    ctx: Any, run: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    q, k, v, key_lengths, out, row_max, row_sum = ctx.saved_tensors
    if torch.is_grad_enabled():
        return reference_gradients(
            lambda q, k, v: _reference(ctx.problem, q, k, v, key_lengths), (q, k, v), (dout, dlse)
        )
    dout = torch.zeros_like(out) if dout is None else dout
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dlse = dlse if dlse is None else dlse.contiguous()
    tensors = dout, dlse, q, k, v, key_lengths, out, row_max, row_sum
    return run(ctx.implementation, ctx.problem, *tensors)


class AttentionFunction(Function):
    """The autograd node of eager mode; its backward is differentiable through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_lengths: Tensor | None,
        problem: Problem,
        implementation: Implementation,
    ) -> tuple[Tensor, Tensor]:
        out, lse, *statistics = _forward(implementation, problem, q, k, v, key_lengths)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, key_lengths, out, *statistics)
        ctx.problem, ctx.implementation = problem, implementation
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        return *_gradients(ctx, _backward, dout, dlse), None, None, None


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, key_lengths, *options, backend = inputs
    out, _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, key_lengths, out, *statistics)
    ctx.problem = _describe(q, k, v, *options)
    ctx.implementation = table(backend)["attention"]


def _backward_from_graph(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple:
    grads = _gradients(ctx, _backward.from_graph, dout, dlse)
    return *grads, None, None, None, None, None


_forward.register_autograd(_setup_context, _backward_from_graph)
