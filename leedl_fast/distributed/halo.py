"""The halo: keys and values that a rank's queries see and other ranks hold.

Rank r owns the positions [begin, end) of a sequence of S, and its queries see the keys of
[max(0, begin - left), min(S, end + right)): one range, which beyond its own keys has at most `left`
before and `right` after them, whatever S is. It fetches those in one message from each rank that
owns some. The gradients of what was fetched go back the same way.
"""

from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from leedl_fast.distributed.agreement import Group
from leedl_fast.ops.contract import Function


class Halo(NamedTuple):
    """What one rank exchanges with its peers, the ranks that it sends to or receives from.

    begin: position of its first own key.
    before, after: number of fetched keys on either side of its own.
    sends: by peer, which of its own keys the peer's queries see.
    receives: by peer, which of the keys that it has at last, fetched and own, are the peer's.
    """

    rank: int
    begin: int
    before: int
    after: int
    sends: dict[int, range]
    receives: dict[int, range]


@torch.compiler.disable
@lru_cache
def halo_of(seqlens: tuple[int, ...], rank: int, left: int, right: int) -> Halo:
    """seqlens: how many positions each rank owns; left, right: how far a query sees."""
    ends = list(accumulate(seqlens))
    owned = [range(end - seqlen, end) for end, seqlen in zip(ends, seqlens, strict=True)]
    # Where there are no queries, nothing is needed.
    needed = [
        range(max(0, own.start - left), min(ends[-1], own.stop + right)) if own else own
        for own in owned
    ]
    own, need = owned[rank], needed[rank]
    peers = [peer for peer in range(len(seqlens)) if peer != rank]
    sends = {peer: _common(own, needed[peer], own.start) for peer in peers}
    receives = {peer: _common(need, owned[peer], need.start) for peer in peers}
    return Halo(
        rank,
        own.start,
        own.start - need.start,
        need.stop - own.stop,
        {peer: part for peer, part in sends.items() if part},
        {peer: part for peer, part in receives.items() if part},
    )


def _common(x: range, y: range, origin: int) -> range:
    """The positions in both, counted from `origin`."""
    return range(max(x.start, y.start) - origin, min(x.stop, y.stop) - origin)


@torch.compiler.disable
def fetch(halo: Halo, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """k and v (batch, num_heads_k, seqlen, head_dim) with the halo before and after them.

    Differentiable any number of times; every rank must then run every backward, as it must run
    every forward. torch.compile breaks its graph here.
    """
    if not halo.sends and not halo.receives:
        return k, v
    return _Fetch.apply(halo, group, k, v)


class _Fetch(Function):
    @staticmethod
    def forward(ctx: Any, halo: Halo, group: Group, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ctx.halo, ctx.group = halo, group
        parts = _exchange(halo.sends, halo.receives, group, k, v)
        parts[halo.rank] = (k, v)
        all_k, all_v = zip(*(parts[rank] for rank in sorted(parts)), strict=True)
        return torch.cat(all_k, dim=2), torch.cat(all_v, dim=2)

    @staticmethod
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[None, None, Tensor, Tensor]:
        return None, None, *_GiveBack.apply(ctx.halo, ctx.group, dk, dv)


class _GiveBack(Function):
    """The transpose of _Fetch: each owner gets the gradients of its keys from all who saw them.

    It adds them to its own in the order of the ranks, in float32 or better, and rounds once.
    """

    @staticmethod
    def forward(
        ctx: Any, halo: Halo, group: Group, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.halo, ctx.group = halo, group
        parts = _exchange(halo.receives, halo.sends, group, dk, dv)
        own = range(halo.before, dk.shape[2] - halo.after)
        sum_dtype = torch.promote_types(dk.dtype, torch.float32)
        sums = [_positions(grad, own).to(sum_dtype, copy=True) for grad in (dk, dv)]
        for peer in sorted(parts):
            for total, part in zip(sums, parts[peer], strict=True):
                _positions(total, halo.sends[peer]).add_(part)
        return sums[0].to(dk.dtype), sums[1].to(dv.dtype)

    @staticmethod
    def backward(ctx: Any, ddk: Tensor, ddv: Tensor) -> tuple[None, None, Tensor, Tensor]:
        return None, None, *_Fetch.apply(ctx.halo, ctx.group, ddk, ddv)


def _exchange(
    sends: dict[int, range],
    receives: dict[int, range],
    group: Group,
    k: Tensor,
    v: Tensor,
) -> dict[int, tuple[Tensor, ...]]:
    """Sends each peer its positions of k and v; returns, by peer, as many as it sends of its own.

    The two lie beside each other in one message.
    """
    widths = (k.shape[3], v.shape[3])
    outgoing = {
        peer: torch.cat((_positions(k, part), _positions(v, part)), dim=3)
        for peer, part in sends.items()
    }
    incoming = {
        peer: k.new_empty(*k.shape[:2], len(part), sum(widths)) for peer, part in receives.items()
    }
    operations = [
        dist.P2POp(operation, message, group=group, group_peer=peer)
        for operation, messages in ((dist.isend, outgoing), (dist.irecv, incoming))
        for peer, message in messages.items()
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return {peer: message.split(widths, dim=3) for peer, message in incoming.items()}


def _positions(x: Tensor, part: range) -> Tensor:
    return x[:, :, part.start : part.stop]
