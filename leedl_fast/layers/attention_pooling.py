"""Attention pooling: a sequence of vectors to one, by a query that is learnt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leedl_fast.layers.attention import MultiHeadAttention


class AttentionPooling(nn.Module):
    """`attention(query, x, x)` with a parameter `query` (embed_dim,): N vectors to 1.

    Args:
        embed_dim, num_heads, bias, score, normalizer: see MultiHeadAttention.

    Shapes: x (batch, seqlen, embed_dim), key_lengths int64 (batch,); returns (batch, embed_dim).

    Papers: Lee et al., "Set Transformer: A Framework for Attention-based Permutation-Invariant
    Neural Networks", section 3.2, with one seed and no residual; the additive score is that of Yang
    et al., "Hierarchical Attention Networks for Document Classification", equations 5 to 7.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        *,
        bias: bool = True,
        score: str = "dot",
        normalizer: str = "softmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            embed_dim,
            num_heads,
            bias=bias,
            score=score,
            normalizer=normalizer,
            device=device,
            dtype=dtype,
        )
        self.query = nn.Parameter(torch.empty(embed_dim, device=device, dtype=dtype))
        nn.init.normal_(self.query)

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        query = self.query.expand(x.shape[0], 1, -1)
        return self.attention(query, x, key_lengths=key_lengths)[:, 0]
