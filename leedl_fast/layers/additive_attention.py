"""Additive attention as a layer: projections, heads as views, the fused `additive_attention` op."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from leedl_fast.layers.attention_layer import AttentionLayer
from leedl_fast.ops.additive_attention import additive_attention
from leedl_fast.ops.windows import Window


class AdditiveAttention(AttentionLayer):
    """`out_proj(concat_h softmax_j(score_weight_h . tanh(q_hi + k_hj)) v_hj)`: attention with the
    additive score, where q, k and v are projections of the inputs.

    Args:
        embed_dim: width of the inputs and of the output; a multiple of num_heads.
        num_heads: heads, each with a score of its own.
        score_dim: width of a head's q and k; None means embed_dim // num_heads, which is the width
            of its v.
        causal: query i sees no key after i (bottom-right aligned when the lengths differ).
        window: None, w or (left, right): which keys around its own position a query sees,
            inclusive; w means (w, w), or (w, 0) when causal.
        bias: whether the projections have biases. k has none: q's bias already shifts q + k.

    Shapes: query (batch, seqlen_q, embed_dim), key and value (batch, seqlen_k, embed_dim),
    key_lengths int64 (batch,); the output is (batch, seqlen_q, embed_dim). With need_weights=True
    it is (output, weights), the weights (batch, num_heads, seqlen_q, seqlen_k).

    Memory grows with seqlen_q + seqlen_k, forward and backward. ValueError where a size is wrong.

    Paper: Bahdanau et al., "Neural Machine Translation by Jointly Learning to Align and Translate",
    appendix A.1.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        *,
        score_dim: int | None = None,
        causal: bool = False,
        window: Window = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        if embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a positive multiple of num_heads ({num_heads}), got {embed_dim}"
            )
        score_dim = embed_dim // num_heads if score_dim is None else score_dim
        if score_dim < 1:
            raise ValueError(f"score_dim must be at least 1, got {score_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.score_dim = score_dim
        self.causal = causal
        self.window = window

        def linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(embed_dim, num_heads * score_dim, bias)
        self.k_proj = linear(embed_dim, num_heads * score_dim, False)
        self.v_proj = linear(embed_dim, embed_dim, bias)
        self.out_proj = linear(embed_dim, embed_dim, bias)
        self.score_weight = nn.Parameter(
            torch.empty(num_heads, score_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        bound = 1 / math.sqrt(self.score_dim)
        nn.init.uniform_(self.score_weight, -bound, bound)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Self-attention of `query`, or cross-attention when `key` (and `value`) are given.

        need_weights computes the weights a second time, in plain PyTorch: the fused kernels never
        hold them.
        """
        q, k, v = self._heads(query, key, value)
        out = self._attention(q, k, v, key_lengths)
        output = self.out_proj(out.transpose(1, 2).flatten(2))
        return (output, self._weights(q, k, key_lengths)) if need_weights else output

    def _heads(
        self, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (batch, num_heads, seqlen, width)."""
        self._check(query, key, value)
        key = query if key is None else key
        value = key if value is None else value
        return (
            self._split_heads(self.q_proj(query)),
            self._split_heads(self.k_proj(key)),
            self._split_heads(self.v_proj(value)),
        )

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_lengths: Tensor | None,
        *,
        backend: str | None = None,
    ) -> Tensor:
        return additive_attention(
            q,
            k,
            v,
            self.score_weight.to(q.dtype),  # under autocast the projections are of another one
            causal=self.causal,
            window=self.window,
            key_lengths=key_lengths,
            backend=backend,
        )

    def _split_heads(self, x: Tensor) -> Tensor:
        """A view: (batch, seqlen, num_heads * width) -> (batch, num_heads, seqlen, width)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, score_dim={self.score_dim}, "
            f"causal={self.causal}, window={self.window}"
        )
