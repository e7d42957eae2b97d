"""What one call of attention is: its sizes and options, and the checks that make them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from leedl_fast.ops import checks
from leedl_fast.ops.checks import Kind
from leedl_fast.ops.heads import check_qkv
from leedl_fast.ops.seeds import check_dropout_p
from leedl_fast.ops.windows import Window, window_sides

NORMALIZERS = ("softmax", "relu", "sigmoid")


class Problem(NamedTuple):
    """Sizes and options of one call.

    The window is inclusive and never unlimited: at most seqlen_q + seqlen_k, which reaches
    everything. With cu_seqlens, num_sequences sequences lie one after another in a batch of 1, and
    seqlen_q and seqlen_k are those of all of them; num_sequences is None otherwise.
    bias_shape is (batch or 1, num_heads or 1, seqlen_q or 1, seqlen_k). wants_dbias: the backward
    fills the gradient of bias; it leaves it out otherwise. wants_statistics: the forward fills lse
    and what the backward takes; in a graph it always does.
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
    softmax_scale: float
    window_left: int
    window_right: int
    normalizer: str = "softmax"
    softcap: float | None = None
    dropout_p: float = 0.0
    bias_shape: tuple[int, ...] | None = None
    wants_dbias: bool = False
    has_sinks: bool = False
    has_alibi: bool = False
    num_sequences: int | None = None
    wants_statistics: bool = True

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class Inputs(NamedTuple):
    """The tensors of one call, as every kernel takes them.

    bias has 4 dimensions and a contiguous last one; sinks, (num_heads,), and alibi_slopes,
    (num_heads,) or (batch, num_heads), with cu_seqlens (num_sequences, num_heads), are of the
    statistics' dtype; the others are int64: key_lengths (batch,), cu_seqlens (num_sequences + 1,),
    seed (1,).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seed: Tensor | None = None


def describe(
    inputs: Inputs,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    normalizer: str,
    softcap: float | None,
    dropout_p: float,
    wants_dbias: bool,
) -> Problem:
    """The Problem of inputs that were checked before: what a graph carries is enough."""
    q, k, v = inputs[:3]
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
        window_left,
        window_right,
        normalizer,
        softcap,
        dropout_p,
        None if inputs.bias is None else tuple(inputs.bias.shape),
        wants_dbias,
        inputs.sinks is not None,
        inputs.alibi_slopes is not None,
        None if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.shape[0] - 1,
    )


def options(problem: Problem) -> tuple:
    """What `describe` needs beside the inputs."""
    return (
        problem.softmax_scale,
        problem.window_left,
        problem.window_right,
        problem.normalizer,
        problem.softcap,
        problem.dropout_p,
        problem.wants_dbias,
    )


def check(
    q: Kind,
    k: Kind,
    v: Kind,
    bias: Kind | None,
    sinks: Kind | None,
    alibi_slopes: Kind | None,
    key_lengths: Kind | None,
    cu_seqlens_q: Kind | None,
    cu_seqlens_k: Kind | None,
    causal: bool,
    window: Window,
    softmax_scale: float | None,
    normalizer: str,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool,
    wants_gradients: bool,
    wants_dbias: bool,
) -> Problem:
    check_qkv(q, k, v)
    (batch, num_heads, seqlen_q, head_dim), dtype, device = q
    (_, num_heads_k, seqlen_k, head_dim_v) = v[0]
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(head_dim)
    else:
        checks.check_finite("softmax_scale", softmax_scale)
    checks.check_choice("normalizer", normalizer, NORMALIZERS)
    if normalizer != "softmax":
        for name, is_given in (("sinks", sinks is not None), ("return_lse", return_lse)):
            if is_given:
                raise ValueError(f"{name} needs normalizer='softmax', got {normalizer!r}")
    if softcap is not None:
        checks.check_finite("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be positive, or None for no cap, got {softcap}")
    check_dropout_p(dropout_p)
    num_sequences = _check_packing(cu_seqlens_q, cu_seqlens_k, q, k, key_lengths, bias)
    if key_lengths is not None:
        checks.check_integer_vector("key_lengths", key_lengths, batch, device)
    if bias is not None:
        _check_bias(bias, (batch, num_heads, seqlen_q, seqlen_k), dtype, device)
    samples = batch if num_sequences is None else num_sequences
    for name, given, shapes in (
        ("sinks", sinks, ((num_heads,),)),
        ("alibi_slopes", alibi_slopes, ((num_heads,), (samples, num_heads))),
    ):
        if given is not None:
            checks.check_floating(name, given[1])
            checks.check_same_device(name, given[2], device, "q")
            if tuple(given[0]) not in shapes:
                allowed = " or ".join(map(str, shapes))
                raise ValueError(f"{name} must have shape {allowed}, got {tuple(given[0])}")
    left, right = window_sides(window, causal, seqlen_q + seqlen_k)
    return Problem(
        batch,
        num_heads,
        num_heads_k,
        seqlen_q,
        seqlen_k,
        head_dim,
        head_dim_v,
        dtype,
        device,
        softmax_scale,
        left,
        right,
        normalizer,
        softcap,
        dropout_p,
        None if bias is None else tuple(bias[0]),
        wants_dbias,
        sinks is not None,
        alibi_slopes is not None,
        num_sequences,
        return_lse or wants_gradients,
    )


def _check_packing(
    cu_seqlens_q: Kind | None,
    cu_seqlens_k: Kind | None,
    q: Kind,
    k: Kind,
    key_lengths: Kind | None,
    bias: Kind | None,
) -> int | None:
    """The number of sequences, or None when they are not packed."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_q must be given when cu_seqlens_k is, got None")
        return None
    assert cu_seqlens_k is not None
    for name, (shape, dtype, device) in (
        ("cu_seqlens_q", cu_seqlens_q),
        ("cu_seqlens_k", cu_seqlens_k),
    ):
        if dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64 or int32, got {dtype}")
        checks.check_same_device(name, device, q[2], "q")
        if len(shape) != 1 or shape[0] < 1:
            raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(shape)}")
    checks.check_shape("cu_seqlens_k", cu_seqlens_k[0], cu_seqlens_q[0])
    if q[0][0] != 1:
        raise ValueError(f"q must have a batch of 1 with cu_seqlens_q, got {q[0][0]}")
    for name, given in (("key_lengths", key_lengths), ("bias", bias)):
        if given is not None:
            raise ValueError(f"{name} must be None with cu_seqlens_q, got a tensor")
    return cu_seqlens_q[0][0] - 1


def check_cumulative(name: str, cu_seqlens: Tensor, total: int) -> None:
    """0 = first <= ... <= last = total; read only where that costs no device synchronisation."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != total or sorted(values) != values:
        raise ValueError(f"{name} must rise from 0 to the length {total} of the pack, got {values}")


def _check_bias(
    bias: Kind, scores: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    shape = tuple(bias[0])
    allowed = zip(shape[:3], scores[:3], strict=True)
    if shape[3] != scores[3] or not all(size in (1, full) for size, full in allowed):
        raise ValueError(
            f"bias must broadcast to the scores' shape {scores} along its first dimensions, "
            f"got {shape}"
        )
    checks.check_same_dtype("bias", bias[1], dtype, "q")
    checks.check_same_device("bias", bias[2], device, "q")
