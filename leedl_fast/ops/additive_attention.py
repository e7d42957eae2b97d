"""Additive attention: the contract (checks, outputs, autograd, the public function)."""

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
from leedl_fast.ops.heads import check_qkv, empty_heads, last_contiguous
from leedl_fast.ops.windows import Window, window_sides


class Problem(NamedTuple):
    """Sizes and options of one call. The window is inclusive and never unlimited: at most
    seqlen_q + seqlen_k, which reaches everything. wants_statistics: the forward fills what the
    backward takes; in a graph it always does.
    """

    batch: int
    num_heads: int
    num_heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    window_left: int
    window_right: int
    wants_statistics: bool = True

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_weight: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    key_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention with the additive score, softmax_j(score_weight . tanh(q_i + k_j)) v_j over
    the keys j that each query i sees.

    Bahdanau et al. 2015, appendix A.1.2. The (seqlen_q, seqlen_k, head_dim) tensor of the tanh is
    never made: memory grows with seqlen_q + seqlen_k, forward and backward.

    Args:
        q: (batch, num_heads, seqlen_q, head_dim), float32, float64, bfloat16 or float16: the
            projected queries (with the score's bias, where there is one).
        k: (batch, num_heads_k, seqlen_k, head_dim), the dtype and device of q: the projected keys.
            num_heads must be a multiple of num_heads_k: head h reads the keys of head
            h // (num_heads // num_heads_k).
        v: (batch, num_heads_k, seqlen_k, head_dim_v); head_dim_v may differ from head_dim.
        score_weight: (head_dim,) for all heads or (num_heads, head_dim); the dtype of q.
        causal: hide the keys after the query's position, aligned bottom-right as in `attention`.
        window: (left, right): query i sees keys i + shift - left to i + shift + right, both
            included, where shift = seqlen_k - seqlen_q. None on a side is unlimited; a number w
            alone means (w, w), or (w, 0) when causal. Negative numbers are an error.
        key_lengths: (batch,) int64 or int32: sample b sees its first key_lengths[b] keys only. What
            the other keys hold is never read into a result.
        backend: "cpu", "triton" or "eager"; by default the fastest that takes the problem.

    Returns:
        (batch, num_heads, seqlen_q, head_dim_v), in the dtype and storage order of q. A query that
        sees no key gives zeros. Differentiable in q, k, v and score_weight, any number of times.

    Scores, softmax and every sum are made in float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, a value or a device is wrong. TypeError: a dtype or a type is wrong.
        NotImplementedError: the backend that was asked for cannot run the problem.
    """
    if isinstance(window, list):
        window = tuple(window)
    wants_gradients = needs_grad(q, k, v, score_weight)
    problem, implementation, is_traced = _resolve(
        backend, (q, k, v, score_weight, key_lengths), causal, window, wants_gradients
    )
    if key_lengths is not None:
        checks.check_range("key_lengths", key_lengths, 0, problem.seqlen_k)
        key_lengths = key_lengths.to(torch.int64).contiguous()
    score_weight = score_weight.expand(problem.num_heads, problem.head_dim)
    if implementation.backend == "eager":
        return _reference(problem, q, k, v, score_weight, key_lengths)
    tensors = *map(last_contiguous, (q, k, v)), score_weight.contiguous(), key_lengths
    if is_traced:
        return _forward.from_graph(implementation, problem, *tensors)[0]
    if wants_gradients:
        return AdditiveAttentionFunction.apply(*tensors, problem, implementation)
    return _forward(implementation, problem, *tensors)[0]


def _check(
    q: Kind,
    k: Kind,
    v: Kind,
    score_weight: Kind,
    key_lengths: Kind | None,
    causal: bool,
    window: Window,
    wants_gradients: bool,
) -> Problem:
    check_qkv(q, k, v)
    (batch, num_heads, seqlen_q, head_dim), dtype, device = q
    weight_shape, weight_dtype, weight_device = score_weight
    if tuple(weight_shape) not in ((head_dim,), (num_heads, head_dim)):
        raise ValueError(
            f"score_weight must have shape {(head_dim,)} or {(num_heads, head_dim)}, "
            f"got {tuple(weight_shape)}"
        )
    checks.check_same_dtype("score_weight", weight_dtype, dtype, "q")
    checks.check_same_device("score_weight", weight_device, device, "q")
    if key_lengths is not None:
        checks.check_integer_vector("key_lengths", key_lengths, batch, device)
    _, num_heads_k, seqlen_k, head_dim_v = v[0]
    left, right = window_sides(window, causal, seqlen_q + seqlen_k)
    return Problem(
        *(batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v),
        *(dtype, device, left, right, wants_gradients),
    )


_resolve = resolver("additive_attention", _check, "q", "k", "v", "score_weight", "key_lengths?")


def _reference(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_weight: Tensor,
    key_lengths: Tensor | None,
) -> Tensor:
    return reference.additive_attention(
        q,
        k,
        v,
        score_weight,
        key_lengths,
        window_left=problem.window_left,
        window_right=problem.window_right,
    )


def _allocate_forward(problem: Problem, q: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    """out, and two numbers per row, None unless they are wanted: the maximum of the scores, and the
    sum of the exponentials of what they are below it. A row that sees no key has inf and 1.
    """
    out = empty_heads(q, problem.seqlen_q, problem.head_dim_v)
    if not problem.wants_statistics:
        return out, None, None
    rows = (problem.batch, problem.num_heads, problem.seqlen_q)
    row_max = q.new_empty(rows, dtype=problem.statistics_dtype)
    return out, row_max, torch.empty_like(row_max)


def _allocate_backward(
    problem: Problem, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, score_weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    """dq, dk, dv in the dtype of q; dscore_weight (num_heads, head_dim) in the statistics' one."""
    return (
        empty_heads(q, problem.seqlen_q, problem.head_dim),
        empty_heads(k, problem.seqlen_k, problem.head_dim),
        empty_heads(v, problem.seqlen_k, problem.head_dim_v),
        q.new_empty(problem.num_heads, problem.head_dim, dtype=problem.statistics_dtype),
    )


def _describe(q: Tensor, k: Tensor, v: Tensor, window_left: int, window_right: int) -> Problem:
    batch, num_heads, seqlen_q, head_dim = q.shape
    return Problem(
        *(batch, num_heads, k.shape[1], seqlen_q, k.shape[2], head_dim, v.shape[3]),
        *(q.dtype, q.device, window_left, window_right),
    )


def _options(problem: Problem) -> tuple:
    return problem.window_left, problem.window_right


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor score_weight, Tensor? key_lengths"
_OPTIONS = "SymInt window_left, SymInt window_right, str backend"

_forward = Operator(
    "additive_attention",
    "additive_attention_forward",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    5,
    allocate=_allocate_forward,
    describe=lambda q, k, v, score_weight, key_lengths, *options: _describe(q, k, v, *options),
    options=_options,
)
_backward = Operator(
    "additive_attention",
    "additive_attention_backward",
    f"(Tensor dout, {_INPUTS}, Tensor out, Tensor row_max, Tensor row_sum, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    9,
    allocate=_allocate_backward,
    describe=lambda dout, q, k, v, score_weight, key_lengths, out, row_max, row_sum, *options: (
        _describe(q, k, v, *options)
    ),
    options=_options,
)


def _gradients(ctx: Any, run: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, score_weight, key_lengths, *results = ctx.saved_tensors
    if torch.is_grad_enabled():
        return reference_gradients(
            lambda q, k, v, score_weight: (
                _reference(ctx.problem, q, k, v, score_weight, key_lengths),
            ),
            (q, k, v, score_weight),
            (dout,),
        )
    dout = last_contiguous(dout)
    *dqkv, dscore_weight = run(
        ctx.implementation, ctx.problem, dout, q, k, v, score_weight, key_lengths, *results
    )
    return *dqkv, dscore_weight.to(ctx.problem.dtype)


class AdditiveAttentionFunction(Function):
    """The autograd node of eager mode; its backward is differentiable through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        score_weight: Tensor,
        key_lengths: Tensor | None,
        problem: Problem,
        implementation: Implementation,
    ) -> Tensor:
        results = _forward(implementation, problem, q, k, v, score_weight, key_lengths)
        ctx.save_for_backward(q, k, v, score_weight, key_lengths, *results)
        ctx.problem, ctx.implementation = problem, implementation
        return results[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        return *_gradients(ctx, _backward, dout), None, None, None


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, score_weight, key_lengths, *options, backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, score_weight, key_lengths, *output)
    ctx.problem = _describe(q, k, v, *options)
    ctx.implementation = table(backend)["additive_attention"]


def _backward_from_graph(ctx: Any, dout: Tensor, *_: None) -> tuple:
    return *_gradients(ctx, _backward.from_graph, dout), None, None, None, None


_forward.register_autograd(_setup_context, _backward_from_graph)
