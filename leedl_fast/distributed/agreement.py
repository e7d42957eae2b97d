"""What ranks tell each other before they exchange keys: where they disagreed, they would wait for
one another without end.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from leedl_fast.ops import checks

Group = dist.ProcessGroup | None


def rank_in(group: Group) -> int:
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group must have this process in it, got one without it")
    return rank


def gather_seqlens(seqlen: int, *, group: Group = None) -> tuple[int, ...]:
    """How many positions every rank of the group has; each calls it with its own number.

    One small collective, of which a step of training needs no more than one, however many layers it
    has.
    """
    checks.check_int("seqlen", seqlen)
    return agree(seqlen, {}, group)


def agree(seqlen: int, same: Mapping[str, Any], group: Group) -> tuple[int, ...]:
    """The seqlen of every rank. same: what must be equal on all of them, by name.

    Where it is not, every rank raises the same ValueError; so do the others where one announces an
    error.
    """
    told = _gather((seqlen, same), group)
    for rank, of_rank in enumerate(told):
        if isinstance(of_rank, str):
            raise ValueError(
                f"the arguments must be right on every rank, on rank {rank}: {of_rank}"
            )
    for name in same:
        values = [facts[name] for _, facts in told]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} must be the same on every rank, got {values}")
    return tuple(length for length, _ in told)


def announce(error: Exception, group: Group) -> None:
    """In the place of `agree`, on a rank that cannot go on."""
    _gather(str(error), group)


def check_seqlens(seqlens: Sequence[int], group: Group) -> tuple[int, ...]:
    """One length for each rank of the group."""
    for length in seqlens:
        checks.check_int("seqlens", length)
    size = dist.get_world_size(group)
    if len(seqlens) != size or min(seqlens) < 0:
        raise ValueError(f"seqlens must hold {size} lengths, one per rank, got {tuple(seqlens)}")
    return tuple(seqlens)


def check_own_seqlen(seqlen: int, seqlens: tuple[int, ...], rank: int) -> None:
    if seqlen != seqlens[rank]:
        raise ValueError(
            f"seqlens must hold {seqlen}, what rank {rank} has, at {rank}, got {seqlens}"
        )


@torch.compiler.disable
def _gather(mine: Any, group: Group) -> list[Any]:
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group)
    return told
