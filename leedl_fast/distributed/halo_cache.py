"""Causal layers over a split sequence: each rank goes on where the ranks before it end."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from leedl_fast.distributed.agreement import Group, check_own_seqlen, check_seqlens, rank_in
from leedl_fast.distributed.halo import fetch, halo_of
from leedl_fast.layers import KVCache, TransformerEncoder


class HaloCache(KVCache):
    """What a rank's tokens see of those of the ranks before it.

    It stands where a KVCache has what new tokens see of earlier ones, and so gives layers, rotary
    and learned positions the place of the tokens; but it keeps nothing, may be used again, and
    gradients go through it. For self-attention that is causal.

    Args:
        seqlens: how many tokens each rank of the group has, see `gather_seqlens`.
        window: how many tokens before its own a token sees, the layer's; None means all of them.
    """

    differentiable = True

    def __init__(
        self, seqlens: Sequence[int], *, window: int | None = None, group: Group = None
    ) -> None:
        super().__init__(window=window)
        self.group, self.rank = group, rank_in(group)
        self.seqlens = check_seqlens(seqlens, group)
        left = sum(self.seqlens) if window is None else window
        self._halo = halo_of(self.seqlens, self.rank, left, 0)
        self.length = self._halo.begin

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that this rank's queries see; every rank of the group must call it.

        k and v: (batch, num_heads_k, seqlen, head_dim) of this rank's tokens.
        """
        check_own_seqlen(k.shape[2], self.seqlens, self.rank)
        return fetch(self._halo, k, v, self.group)


def halo_caches(
    encoder: TransformerEncoder, seqlens: Sequence[int], *, group: Group = None
) -> list[HaloCache]:
    """The caches with which a causal encoder runs on a split sequence, one per layer.

    A training step of a GPT, of which every rank has all parameters and its part of each text::

        seqlens = gather_seqlens(tokens.shape[1])
        caches = halo_caches(model.transformer, seqlens)
        hidden = model.hidden(tokens, caches=caches)
        loss = linear_cross_entropy(hidden, model.head.weight, targets, reduction="sum")
        (loss / (len(tokens) * sum(seqlens))).backward()
        for parameter in model.parameters():  # so far what this rank's tokens add to it
            torch.distributed.all_reduce(parameter.grad)

    Dropout draws from each rank's own generator: seed those differently.
    """
    return [HaloCache(seqlens, window=cache.window, group=group) for cache in encoder.new_caches()]
