"""Attention: the contract (outputs, autograd, the public function) of full, causal and windowed
attention.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from leedl_fast import reference
from leedl_fast.backends import table
from leedl_fast.ops import attention_problem, checks
from leedl_fast.ops.attention_problem import Inputs, Problem
from leedl_fast.ops.contract import (
    Function,
    Operator,
    needs_grad,
    reference_gradients,
    resolver,
)
from leedl_fast.ops.heads import empty_heads, last_contiguous
from leedl_fast.ops.seeds import dropout_seed
from leedl_fast.ops.windows import Window


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window: Window = ...,
    softmax_scale: float | None = ...,
    normalizer: str = ...,
    bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | Tensor | None = ...,
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
    normalizer: str = ...,
    bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | Tensor | None = ...,
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
    normalizer: str = "softmax",
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, softmax(softmax_scale * q k^T) v over the keys that each query
    sees.

    Vaswani et al. 2017, equation 1; truncated self-attention when a window is given. The formula
    with all the options, which combine freely, stands in `leedl_fast/reference/attention.py`.

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
        normalizer: "softmax"; "relu" or "sigmoid" take that function of each score instead, and
            nothing makes a row sum to one.
        bias: added to the scaled scores: (seqlen_q, seqlen_k), or up to 4 dimensions that broadcast
            to (batch, num_heads, seqlen_q, seqlen_k); the dtype of q; -inf hides a key.
            Differentiable.
        alibi_slopes: (num_heads,) or (batch, num_heads), slope * |i + shift - j| is subtracted from
            the scores (Press et al. 2022). Not differentiable.
        softcap: positive; scaled scores become softcap * tanh(score / softcap), before bias and
            slopes (Gemma 2).
        sinks: (num_heads,): the score of one more key, of value zero, that every query of the head
            sees (gpt-oss). Differentiable.
        key_lengths: (batch,) int64 or int32: sample b sees its first key_lengths[b] keys only. Does
            not move the diagonal. What the other keys hold is never read into a result.
        cu_seqlens_q: (sequences + 1,) int64 or int32, rising from 0 to seqlen_q: a batch of 1 that
            holds many sequences, one after another; sequence s is queries cu_seqlens_q[s] to
            cu_seqlens_q[s + 1] - 1, and sees its own keys alone.
        cu_seqlens_k: the same for the keys; cu_seqlens_q by default.
        dropout_p: each probability becomes 0 with this probability, and p / (1 - dropout_p)
            otherwise. Which ones follows from the seed and the place (sample, head, query, key)
            alone: the same on every backend.
        seed: an int, or an int64 tensor of one element, for dropout; None draws one from torch's
            default generator.
        return_lse: return (out, lse) with lse (batch, num_heads, seqlen_q), the natural log of each
            query's sum of exponentials, in float32 (float64 for float64); differentiable.
        backend: "cpu", "triton", "cuda" or "eager"; by default the fastest that takes the problem.

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
    if isinstance(window, list):
        window = tuple(window)
    if isinstance(bias, Tensor) and isinstance(k, Tensor) and k.dim() == 4:
        bias = _bias_of_four_dimensions(bias, k.shape[2])
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    wants_gradients = needs_grad(q, k, v, bias, sinks)
    problem, implementation, is_traced = _resolve(
        backend,
        (q, k, v, bias, sinks, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k),
        causal,
        window,
        softmax_scale,
        normalizer,
        softcap,
        dropout_p,
        return_lse,
        wants_gradients,
        bias is not None and needs_grad(bias),
    )
    inputs = _inputs(
        problem, q, k, v, bias, sinks, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, seed
    )
    if implementation.backend == "eager":
        out, lse = _reference(problem, inputs, return_lse=return_lse)
    elif is_traced:
        out, lse, _, _ = _forward.from_graph(implementation, problem, *inputs)
    elif wants_gradients:
        out, lse = AttentionFunction.apply(*inputs, problem, implementation)
    else:
        out, lse, _, _ = _forward(implementation, problem, *inputs)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


_resolve = resolver(
    "attention",
    attention_problem.check,
    *("q", "k", "v", "bias?", "sinks?", "alibi_slopes?"),
    *("key_lengths?", "cu_seqlens_q?", "cu_seqlens_k?"),
)


def _bias_of_four_dimensions(bias: Tensor, seqlen_k: int) -> Tensor:
    if not 1 <= bias.dim() <= 4:
        raise ValueError(f"bias must have 1 to 4 dimensions, got shape {tuple(bias.shape)}")
    bias = bias[(None,) * (4 - bias.dim())]
    if bias.shape[3] == 1 != seqlen_k:
        bias = bias.expand(*bias.shape[:3], seqlen_k)
    return last_contiguous(bias)


def _inputs(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: int | Tensor | None,
) -> Inputs:
    """The tensors in the dtypes and layouts that kernels take; values are checked here."""
    if sinks is not None:
        sinks = sinks.to(problem.statistics_dtype).contiguous()
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach().to(problem.statistics_dtype).contiguous()
    if key_lengths is not None:
        checks.check_range("key_lengths", key_lengths, 0, problem.seqlen_k)
        key_lengths = key_lengths.to(torch.int64).contiguous()
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        attention_problem.check_cumulative("cu_seqlens_q", cu_seqlens_q, problem.seqlen_q)
        attention_problem.check_cumulative("cu_seqlens_k", cu_seqlens_k, problem.seqlen_k)
        cu_seqlens_q = cu_seqlens_q.to(torch.int64).contiguous()
        cu_seqlens_k = cu_seqlens_k.to(torch.int64).contiguous()
    return Inputs(
        last_contiguous(q),
        last_contiguous(k),
        last_contiguous(v),
        bias,
        sinks,
        alibi_slopes,
        key_lengths,
        cu_seqlens_q,
        cu_seqlens_k,
        dropout_seed(seed, problem.device) if problem.dropout_p > 0 else None,
    )


def _reference(
    problem: Problem, inputs: Inputs, *, return_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    return reference.attention(
        *inputs,
        softmax_scale=problem.softmax_scale,
        window_left=problem.window_left,
        window_right=problem.window_right,
        normalizer=problem.normalizer,
        softcap=problem.softcap,
        dropout_p=problem.dropout_p,
        return_lse=return_lse,
    )


def _allocate_forward(problem: Problem, q: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    """out, lse, and two numbers of each row that a backend keeps for its own backward pass: the
    maximum and the sum of the exponentials, or what is made of them. The last three are None unless
    they are wanted, and empty unless the normalizer is softmax.
    """
    out = empty_heads(q, problem.seqlen_q, problem.head_dim_v)
    if not problem.wants_statistics:
        return out, None, None, None
    rows = (problem.batch, problem.num_heads, problem.seqlen_q)
    rows = rows if problem.normalizer == "softmax" else (0,) * 3
    lse = q.new_empty(rows, dtype=problem.statistics_dtype)
    return out, lse, torch.empty_like(lse), torch.empty_like(lse)


def _allocate_backward(
    problem: Problem, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias (empty unless wanted), dsinks (empty without sinks)."""
    assert problem.bias_shape is not None or not problem.wants_dbias
    dbias_shape = problem.bias_shape if problem.wants_dbias and problem.bias_shape else (0,)
    return (
        empty_heads(q, problem.seqlen_q, problem.head_dim),
        empty_heads(k, problem.seqlen_k, problem.head_dim),
        empty_heads(v, problem.seqlen_k, problem.head_dim_v),
        q.new_empty(dbias_shape, dtype=problem.statistics_dtype),
        q.new_empty(problem.num_heads if problem.has_sinks else 0, dtype=problem.statistics_dtype),
    )


_NUM_INPUTS = len(Inputs._fields)
_INPUTS_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? alibi_slopes, "
    "Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed"
)
_OPTIONS_SCHEMA = (
    "float softmax_scale, SymInt window_left, SymInt window_right, str normalizer, float? softcap, "
    "float dropout_p, bool wants_dbias, str backend"
)


def _describe_forward(*values: Any) -> Problem:
    return attention_problem.describe(Inputs(*values[:_NUM_INPUTS]), *values[_NUM_INPUTS:])


def _describe_backward(dout: Tensor, dlse: Tensor | None, *values: Any) -> Problem:
    inputs, after_statistics = Inputs(*values[:_NUM_INPUTS]), _NUM_INPUTS + 3
    return attention_problem.describe(inputs, *values[after_statistics:])


_forward = Operator(
    "attention",
    "attention_forward",
    f"({_INPUTS_SCHEMA}, {_OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _NUM_INPUTS,
    allocate=_allocate_forward,
    describe=_describe_forward,
    options=attention_problem.options,
)
_backward = Operator(
    "attention",
    "attention_backward",
    f"(Tensor dout, Tensor? dlse, {_INPUTS_SCHEMA}, Tensor out, Tensor row_max, Tensor row_sum, "
    f"{_OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _NUM_INPUTS + 5,
    allocate=_allocate_backward,
    describe=_describe_backward,
    options=attention_problem.options,
)


def _gradients(ctx: Any, run: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    """The gradients of q, k, v, bias and sinks."""
    *saved, out, row_max, row_sum = ctx.saved_tensors
    inputs: Inputs = Inputs(*saved)
    problem: Problem = ctx.problem
    if torch.is_grad_enabled():
        return reference_gradients(
            lambda q, k, v, bias, sinks: _reference(
                problem, Inputs(q, k, v, bias, sinks, *inputs[5:])
            ),
            inputs[:5],
            (dout, dlse),
        )
    dout = torch.zeros_like(out) if dout is None else last_contiguous(dout)
    dlse = dlse if dlse is None else dlse.contiguous()
    dq, dk, dv, dbias, dsinks = run(
        ctx.implementation, problem, dout, dlse, *inputs, out, row_max, row_sum
    )
    return (
        dq,
        dk,
        dv,
        dbias.to(problem.dtype) if problem.wants_dbias else None,
        dsinks if problem.has_sinks else None,
    )


class AttentionFunction(Function):
    """The autograd node of eager mode; its backward is differentiable through the reference."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, problem, implementation = arguments
        out, lse, *statistics = _forward(implementation, problem, *inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, out, *statistics)
        ctx.problem, ctx.implementation = problem, implementation
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        return *_gradients(ctx, _backward, dout, dlse), *_NO_GRADIENTS, None, None


_NO_GRADIENTS = (None,) * (_NUM_INPUTS - 5)  # of the inputs after q, k, v, bias and sinks


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *values, backend = inputs
    out, _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*values[:_NUM_INPUTS], out, *statistics)
    ctx.problem = _describe_forward(*values)
    ctx.implementation = table(backend)["attention"]


def _backward_from_graph(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple:
    num_options = len(attention_problem.options(ctx.problem)) + 1  # and the backend
    grads = _gradients(ctx, _backward.from_graph, dout, dlse)
    return *grads, *_NO_GRADIENTS, *(None,) * num_options


_forward.register_autograd(_setup_context, _backward_from_graph)
