"""What the layers of attention share: the check of their inputs, and weights on request."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AttentionLayer(nn.Module):
    """A layer over a fused kernel of attention, which never holds the weights.

    A subclass has `embed_dim`, projects its inputs in `_heads` and calls its op in `_attention`.
    """

    embed_dim: int

    def attention_weights(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """The weights of `forward` alone: (batch, num_heads, seqlen_q, seqlen_k)."""
        q, k, _ = self._heads(query, key, value)
        return self._weights(q, k, key_lengths)

    def _heads(
        self, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (batch, heads, seqlen, width of a head)."""
        raise NotImplementedError

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_lengths: Tensor | None,
        *,
        backend: str | None = None,
    ) -> Tensor:
        raise NotImplementedError

    def _weights(self, q: Tensor, k: Tensor, key_lengths: Tensor | None) -> Tensor:
        """Unit vectors as values: each output is then the row of weights itself, mask and all."""
        units = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
        return self._attention(
            q, k, units.expand(*k.shape[:2], -1, -1), key_lengths, backend="eager"
        )

    def _check(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> None:
        if key is None and value is not None:
            raise ValueError("key must be given when value is, got None")
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x is not None and (x.dim() != 3 or x.shape[2] != self.embed_dim):
                raise ValueError(
                    f"{name} must have shape (batch, seqlen, {self.embed_dim}), "
                    f"got {tuple(x.shape)}"
                )
