"""Attention over a sequence that is split between the ranks of a process group."""

import sys
from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from leedl_fast import ops
from leedl_fast.distributed.agreement import (
    Group,
    agree,
    announce,
    check_own_seqlen,
    check_seqlens,
    rank_in,
)
from leedl_fast.distributed.halo import fetch, halo_of
from leedl_fast.ops import checks
from leedl_fast.ops.contract import needs_grad
from leedl_fast.ops.heads import check_qkv
from leedl_fast.ops.windows import Window, window_sides


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
    alibi_slopes: Tensor | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    seqlens: Sequence[int] | None = ...,
    group: Group = ...,
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
    alibi_slopes: Tensor | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    key_lengths: Tensor | None = ...,
    return_lse: Literal[True],
    seqlens: Sequence[int] | None = ...,
    group: Group = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    seqlens: Sequence[int] | None = None,
    group: Group = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`leedl_fast.attention` of a sequence of which each rank holds some successive positions.

    Rank 0 holds the first seqlen positions of q, k and v, rank 1 those after them, and so on; the
    numbers may differ, and be 0. A rank gets the outputs of its own queries, after it has fetched
    the keys and values that they see and other ranks hold: with a window at most that many before
    and after its own, however long the sequence; under causal only earlier ones; without either,
    all. Everything else runs in the ordinary kernels. Every rank of the group must call it, and
    run its backward.

    Args:
        q: (batch, num_heads, seqlen, head_dim), this rank's; dtypes as for `leedl_fast.attention`.
        k: (batch, num_heads_k, seqlen, head_dim).
        v: (batch, num_heads_k, seqlen, head_dim_v).
        causal, window: as for `leedl_fast.attention`, in positions of the whole sequence.
        softmax_scale, normalizer, softcap, return_lse, backend: as for `leedl_fast.attention`.
        alibi_slopes: the same; only where no query sees keys after its own.
        sinks: the same, equal on every rank. Its gradient, like that of any parameter, is what this
            rank's queries add to it: sum it over the group.
        key_lengths: (batch,), of the whole sequence and equal on every rank.
        seqlens: the seqlen of every rank, in their order. None has the ranks tell each other, and
            compare what must agree between them (shapes, dtypes, window, whether k and v need
            gradients): a small collective, which on GPUs waits for the device. With seqlens (see
            `gather_seqlens`) nothing is compared, and ranks that disagree wait for each other until
            the group's timeout.
        group: the process group; None means the default one. gloo on CPUs, NCCL on GPUs (which was
            not run). NCCL wants all ranks in a group's first call, and a rank without positions
            sends nothing: where there is one, have a `torch.distributed.barrier` before.

    Returns:
        out, (batch, num_heads, seqlen, head_dim_v), or (out, lse), of this rank's queries.

    The gradients of fetched keys go back to the rank that owns them, which adds them to its own in
    the order of the ranks, in float32 (float64 for float64): from run to run the bits are the same.
    They are not those of one process, where a key's gradient is one sum over all its queries.
    Differentiable any number of times.

    Raises:
        ValueError, TypeError: as `leedl_fast.attention`, and where ranks disagree: on all of them.
    """
    rank = rank_in(group)
    try:
        left, right = _check(q, k, v, causal, window, alibi_slopes, options)
    except (TypeError, ValueError) as error:
        if seqlens is None:
            announce(error, group)
        raise
    if seqlens is None:
        seqlens = agree(q.shape[2], _what_ranks_share(k, v, causal, window), group)
    else:
        seqlens = check_seqlens(seqlens, group)
        check_own_seqlen(q.shape[2], seqlens, rank)
    halo = halo_of(tuple(seqlens), rank, left, right)
    if key_lengths is not None:
        checks.check_tensor("key_lengths", key_lengths)
        checks.check_range("key_lengths", key_lengths, 0, sum(seqlens))
        # Those beyond the keys that are here reach their end.
        first = halo.begin - halo.before
        key_lengths = (key_lengths - first).clamp(0, halo.before + k.shape[2] + halo.after)
    all_k, all_v = fetch(halo, k, v, group)
    # The last query stands at the last key, `after` positions too far to the right.
    return ops.attention(
        q,
        all_k,
        all_v,
        window=(left + halo.after, right - halo.after),
        alibi_slopes=alibi_slopes,
        key_lengths=key_lengths,
        **options,
    )


_UNLIMITED = sys.maxsize
_WHOLE_SEQUENCES_ONLY = {
    "bias": "a dense bias has a column for every key of the whole sequence",
    "dropout_p": "what is dropped follows from the place in the tensors, and so from the split",
    "seed": "there is no dropout",
    "cu_seqlens_q": "whole sequences of a pack are divided between ranks without being split",
    "cu_seqlens_k": "whole sequences of a pack are divided between ranks without being split",
}


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: Window,
    alibi_slopes: Tensor | None,
    options: dict[str, Any],
) -> tuple[int, int]:
    """The window's sides."""
    for name in options:
        if name in _WHOLE_SEQUENCES_ONLY:
            raise ValueError(
                f"{name} must be left out of a split sequence: {_WHOLE_SEQUENCES_ONLY[name]}"
            )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(name, tensor)
    check_qkv(*(checks.Kind(x.shape, x.dtype, x.device) for x in (q, k, v)))
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have the seqlen of q, {q.shape[2]}, got {k.shape[2]}")
    left, right = window_sides(window, causal, _UNLIMITED)
    if alibi_slopes is not None and right > 0:
        raise ValueError(
            "alibi_slopes needs causal=True or a window without keys to the right, "
            f"got window={window}: distances count from the last key, which is another rank's"
        )
    return left, right


def _what_ranks_share(k: Tensor, v: Tensor, causal: bool, window: Window) -> dict[str, Any]:
    """By name; without it the messages of one rank would not be those that another one awaits."""
    return {
        "the batch": k.shape[0],
        "the heads of k": k.shape[1],
        "the head_dim of k": k.shape[3],
        "the head_dim of v": v.shape[3],
        "the dtype": k.dtype,
        "the type of device": k.device.type,
        "causal": causal,
        "window": window,
        "whether k or v needs gradients": needs_grad(k, v),
    }
