"""Multi-head attention: one projection, heads as views, the fused `attention` op."""

from __future__ import annotations

from typing import Literal, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.layers.attention_layer import AttentionLayer
from leedl_fast.layers.kv_cache import KVCache
from leedl_fast.layers.rotary import RotaryPositionalEncoding
from leedl_fast.ops.additive_attention import additive_attention
from leedl_fast.ops.attention import attention
from leedl_fast.ops.windows import Window

Score = Literal["dot", "additive"]
Normalizer = Literal["softmax", "relu", "sigmoid"]


def packed_projection(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, of these widths, whose rows of the weight and the bias follow on one another. As few
    matrix products as the inputs allow: equal inputs share one.
    """
    if key is query and value is query:
        q, k, v = F.linear(query, weight, bias).split(sizes, dim=-1)
        return q, k, v

    width, widths = sizes[0], sizes[1:]
    weight_q, weight_kv = weight.split([width, sum(widths)])
    bias_q, bias_kv = (None, None) if bias is None else bias.split([width, sum(widths)])
    q = F.linear(query, weight_q, bias_q)
    if value is key:
        k, v = F.linear(key, weight_kv, bias_kv).split(widths, dim=-1)
        return q, k, v
    weight_k, weight_v = weight_kv.split(widths)
    bias_k, bias_v = (None, None) if bias_kv is None else bias_kv.split(widths)
    return q, F.linear(key, weight_k, bias_k), F.linear(value, weight_v, bias_v)


class MultiHeadAttention(AttentionLayer):
    """`out_proj(concat_h attention(q_h, k_h, v_h))` with q, k, v projected from the inputs.

    Parameters are named and laid out as in `torch.nn.MultiheadAttention`, so a state dict of one
    loads into the other (for num_heads_k = num_heads).

    Args:
        embed_dim: width of the inputs and of the output; a multiple of num_heads.
        num_heads: heads of the queries; a multiple of num_heads_k.
        num_heads_k: heads of the keys and values (grouped-query attention); None means num_heads.
        causal: query i sees no key after i (bottom-right aligned when the lengths differ).
        window: None, w or (left, right): which keys around its own position a query sees,
            inclusive; w means (w, w), or (w, 0) when causal.
        bias: whether the projections have biases.
        rotary: turn queries and keys by their positions; for self-attention alone.
        dropout: probability of dropping an attention weight while training.
        score: "dot", q . k / sqrt(head_dim), or "additive", score_weight . tanh(q + k) with a
            parameter score_weight (num_heads, head_dim).
        normalizer: what makes weights of scores: "softmax", or "relu" or "sigmoid" of each score
            alone, which leave a row without a sum of one.

    The additive score has softmax and no dropout.

    Shapes: query (batch, seqlen_q, embed_dim), key and value (batch, seqlen_k, embed_dim),
    key_lengths int64 (batch,); the output is (batch, seqlen_q, embed_dim). With need_weights=True
    it is (output, weights), the weights (batch, num_heads, seqlen_q, seqlen_k) before dropout.

    Papers: Vaswani et al., "Attention Is All You Need", section 3.2.2; Bahdanau et al., "Neural
    Machine Translation by Jointly Learning to Align and Translate", appendix A.1.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_heads_k: int | None = None,
        causal: bool = False,
        window: Window = None,
        bias: bool = True,
        rotary: bool = False,
        dropout: float = 0.0,
        score: str = "dot",
        normalizer: str = "softmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_heads_k = num_heads if num_heads_k is None else num_heads_k
        for name, value in (("num_heads", num_heads), ("num_heads_k", num_heads_k)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a positive multiple of num_heads ({num_heads}), got {embed_dim}"
            )
        if num_heads % num_heads_k:
            raise ValueError(
                f"num_heads must be a multiple of num_heads_k ({num_heads_k}), got {num_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if score not in get_args(Score):
            raise ValueError(f"score must be one of {get_args(Score)}, got {score!r}")
        if normalizer not in get_args(Normalizer):
            raise ValueError(
                f"normalizer must be one of {get_args(Normalizer)}, got {normalizer!r}"
            )
        if score == "additive" and (normalizer != "softmax" or dropout > 0):
            raise ValueError(
                "score 'additive' must have normalizer 'softmax' and dropout 0, "
                f"got {normalizer!r} and {dropout}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_k = num_heads_k
        self.head_dim = embed_dim // num_heads
        self.causal = causal
        self.window = window
        self.dropout = dropout
        self.score = score
        self.normalizer = normalizer
        self.embed_dim_k = num_heads_k * self.head_dim
        self.rotary = RotaryPositionalEncoding(self.head_dim, device=device) if rotary else None

        in_features = embed_dim + 2 * self.embed_dim_k
        self.in_proj_weight = nn.Parameter(
            torch.empty(in_features, embed_dim, device=device, dtype=dtype)
        )
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(in_features, device=device, dtype=dtype))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        if score == "additive":
            self.score_weight = nn.Parameter(
                torch.empty(num_heads, self.head_dim, device=device, dtype=dtype)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        if self.score == "additive":
            nn.init.xavier_uniform_(self.score_weight)

    @classmethod
    def from_torch(
        cls,
        module: nn.MultiheadAttention,
        *,
        causal: bool = False,
        window: Window = None,
    ) -> MultiHeadAttention:
        """A copy of `module` with its own parameters; inputs are batch-first, whatever it had."""
        if module.in_proj_weight is None:
            raise ValueError(
                f"kdim and vdim must equal embed_dim ({module.embed_dim}), "
                f"got {module.kdim} and {module.vdim}"
            )
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError(
                "add_bias_kv and add_zero_attn must be off, "
                f"got {module.bias_k is not None} and {module.add_zero_attn}"
            )
        copy = cls(
            module.embed_dim,
            module.num_heads,
            causal=causal,
            window=window,
            bias=module.in_proj_bias is not None,
            dropout=module.dropout,
            device=module.in_proj_weight.device,
            dtype=module.in_proj_weight.dtype,
        )
        copy.load_state_dict(module.state_dict())
        return copy.train(module.training)

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = ...,
        value: Tensor | None = ...,
        *,
        key_lengths: Tensor | None = ...,
        need_weights: Literal[False] = ...,
        cache: KVCache | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = ...,
        value: Tensor | None = ...,
        *,
        key_lengths: Tensor | None = ...,
        need_weights: Literal[True],
        cache: KVCache | None = ...,
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        need_weights: bool = False,
        cache: KVCache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Self-attention of `query`, or cross-attention when `key` (and `value`) are given.

        need_weights computes the weights a second time, in plain PyTorch: the fused kernels never
        hold them.

        cache: of `new_cache()`, only without gradients: `query` holds the new tokens, and sees
        those of earlier calls too. Cross-attention projects `key` in the first call alone.
        """
        q, k, v = self._heads(query, key, value, cache)
        dropout_p = self.dropout if self.training else 0.0
        out = self._attention(q, k, v, key_lengths, dropout_p=dropout_p)
        heads = out.transpose(1, 2)  # (batch, seqlen_q, num_heads, head_dim)
        output = self.out_proj(heads.flatten(2))
        return (output, self._weights(q, k, key_lengths)) if need_weights else output

    def new_cache(self) -> KVCache:
        """An empty cache for self-attention, which must be causal."""
        if not self.causal:
            raise ValueError("causal must be True for a cache, got False")
        left = self.window[0] if isinstance(self.window, tuple) else self.window
        return KVCache(window=left)

    def _heads(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (batch, heads, seqlen, head_dim), with what the cache adds to k and v."""
        self._check(query, key, value)
        if cache is not None and torch.is_grad_enabled() and not cache.differentiable:
            raise ValueError("cache must be None where gradients are enabled, got a KVCache")
        if self.rotary is not None and key is not None:
            raise ValueError("key must be None with rotary=True, got a tensor")
        if cache is not None and key is not None and cache.kept is not None:
            width = self.embed_dim
            bias = None if self.in_proj_bias is None else self.in_proj_bias[:width]
            q = F.linear(query, self.in_proj_weight[:width], bias)
            return self._split_heads(q, self.num_heads), *cache.kept
        q, k, v = self._project(query, key, value)
        q = self._split_heads(q, self.num_heads)
        k, v = self._split_heads(k, self.num_heads_k), self._split_heads(v, self.num_heads_k)
        if self.rotary is not None:
            offset = 0 if cache is None else cache.length
            q, k = self.rotary(q, offset=offset), self.rotary(k, offset=offset)
        return (q, k, v) if cache is None else (q, *cache.extend(k, v))

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_lengths: Tensor | None,
        *,
        dropout_p: float = 0.0,
        backend: str | None = None,
    ) -> Tensor:
        if self.score == "additive":
            return additive_attention(
                q,
                k,
                v,
                self.score_weight.to(q.dtype),  # under autocast q is of another one
                causal=self.causal,
                window=self.window,
                key_lengths=key_lengths,
                backend=backend,
            )
        return attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            key_lengths=key_lengths,
            normalizer=self.normalizer,
            dropout_p=dropout_p,
            backend=backend,
        )

    def _project(
        self, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        key = query if key is None else key
        value = key if value is None else value
        sizes = [self.embed_dim, self.embed_dim_k, self.embed_dim_k]
        return packed_projection(query, key, value, self.in_proj_weight, self.in_proj_bias, sizes)

    def _split_heads(self, x: Tensor, num_heads: int) -> Tensor:
        """A view: (batch, seqlen, num_heads * head_dim) -> (batch, num_heads, seqlen, head_dim)."""
        return x.unflatten(2, (num_heads, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_heads_k={self.num_heads_k}, causal={self.causal}, window={self.window}, "
            f"score={self.score}, normalizer={self.normalizer}"
        )
