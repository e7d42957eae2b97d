"""Transformer encoder and decoder layers, and stacks of them.

Every residual addition is fused with a normalisation by `add_layer_norm`. In post-norm layers the
two stand together. In pre-norm layers the addition that ends one sublayer is fused with the
normalisation that begins the next, across layers too: `forward_residual` takes and returns the
pair (branch, residual) whose sum is the stream.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from leedl_fast.layers.add_layer_norm import AddLayerNorm, widened
from leedl_fast.layers.attention import MultiHeadAttention
from leedl_fast.layers.feed_forward import (
    Activation,
    activation_function,
    feed_forward,
    hidden_width,
)
from leedl_fast.layers.kv_cache import DecoderCache, KVCache
from leedl_fast.ops.windows import Window


class TransformerEncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each with residual connection and normalisation.

    Parameters are named and laid out as in `torch.nn.TransformerEncoderLayer`.

    Args:
        embed_dim, num_heads, num_heads_k, causal, window, rotary: see MultiHeadAttention.
        hidden_dim: width of the feed-forward network; None means 4 * embed_dim.
        activation: "relu", "gelu", "gelu_tanh", "quick_gelu", "silu" or a function.
        dropout: probability of dropping a value of a branch while training.
        activation_dropout: that of a hidden value of the feed-forward network; None means dropout.
        attention_dropout: see `dropout` of MultiHeadAttention.
        norm_first: normalise the input of each sublayer (pre-norm) instead of the sum (post-norm).
        eps: see AddLayerNorm.
        bias: whether linears and norms have biases.
        score, normalizer: see MultiHeadAttention.

    Shapes: x (batch, seqlen, embed_dim), key_lengths int64 (batch,); returns x's shape.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_heads_k: int | None = None,
        hidden_dim: int | None = None,
        causal: bool = False,
        window: Window = None,
        rotary: bool = False,
        activation: Activation = "relu",
        dropout: float = 0.0,
        activation_dropout: float | None = None,
        attention_dropout: float = 0.0,
        norm_first: bool = False,
        eps: float = 1e-5,
        bias: bool = True,
        score: str = "dot",
        normalizer: str = "softmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = hidden_width(embed_dim, hidden_dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_first = norm_first
        self.activation = activation_function(activation)
        self.self_attn = MultiHeadAttention(
            embed_dim,
            num_heads,
            num_heads_k=num_heads_k,
            causal=causal,
            window=window,
            bias=bias,
            rotary=rotary,
            dropout=attention_dropout,
            score=score,
            normalizer=normalizer,
            **factory,
        )
        self.linear1 = nn.Linear(embed_dim, hidden_dim, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout if activation_dropout is None else activation_dropout)
        self.linear2 = nn.Linear(hidden_dim, embed_dim, bias=bias, **factory)
        self.norm1 = AddLayerNorm(embed_dim, eps=eps, bias=bias, **factory)
        self.norm2 = AddLayerNorm(embed_dim, eps=eps, bias=bias, **factory)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    @classmethod
    def from_torch(
        cls, module: nn.TransformerEncoderLayer, *, causal: bool = False, window: Window = None
    ) -> TransformerEncoderLayer:
        """A copy of `module` with its own parameters; inputs are batch-first, whatever it had."""
        return _copy_layer(cls, module, causal=causal, window=window)

    def new_cache(self) -> KVCache:
        return self.self_attn.new_cache()

    def forward(
        self, x: Tensor, *, key_lengths: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """cache: see MultiHeadAttention.forward."""
        if self.norm_first:
            branch, residual = self.forward_residual(x, None, key_lengths=key_lengths, cache=cache)
            return residual + branch
        branch = self.self_attn(x, key_lengths=key_lengths, cache=cache)
        x, _ = self.norm1(widened(branch, x), x, self.dropout1)
        x, _ = self.norm2(widened(self._feed_forward(x), x), x, self.dropout2)
        return x

    def forward_residual(
        self,
        branch: Tensor,
        residual: Tensor | None,
        *,
        key_lengths: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pre-norm only: from the stream branch + residual to the next (branch, residual)."""
        normed, residual = self.norm1(branch, residual)
        branch = self.self_attn(normed, key_lengths=key_lengths, cache=cache)
        normed, residual = self.norm2(branch, residual, self.dropout1)
        return self.dropout2(self._feed_forward(normed)), residual

    def _feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)


class TransformerDecoderLayer(nn.Module):
    """Self-attention, cross-attention to `memory`, and feed-forward network.

    Parameters are named and laid out as in `torch.nn.TransformerDecoderLayer`; arguments are those
    of TransformerEncoderLayer. `causal` (here the default) and `window` hold for self-attention:
    cross-attention sees the whole memory.

    Shapes: x (batch, seqlen, embed_dim), memory (batch, seqlen_memory, embed_dim), key_lengths and
    memory_lengths int64 (batch,); returns x's shape.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_heads_k: int | None = None,
        hidden_dim: int | None = None,
        causal: bool = True,
        window: Window = None,
        activation: Activation = "relu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        norm_first: bool = False,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = hidden_width(embed_dim, hidden_dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        heads: dict[str, Any] = {
            "num_heads_k": num_heads_k,
            "bias": bias,
            "dropout": attention_dropout,
            **factory,
        }
        self.norm_first = norm_first
        self.activation = activation_function(activation)
        self.self_attn = MultiHeadAttention(
            embed_dim, num_heads, causal=causal, window=window, **heads
        )
        self.multihead_attn = MultiHeadAttention(embed_dim, num_heads, **heads)
        self.linear1 = nn.Linear(embed_dim, hidden_dim, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden_dim, embed_dim, bias=bias, **factory)
        self.norm1 = AddLayerNorm(embed_dim, eps=eps, bias=bias, **factory)
        self.norm2 = AddLayerNorm(embed_dim, eps=eps, bias=bias, **factory)
        self.norm3 = AddLayerNorm(embed_dim, eps=eps, bias=bias, **factory)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)

    @classmethod
    def from_torch(
        cls, module: nn.TransformerDecoderLayer, *, causal: bool = True, window: Window = None
    ) -> TransformerDecoderLayer:
        """A copy of `module` with its own parameters; inputs are batch-first, whatever it had."""
        return _copy_layer(cls, module, causal=causal, window=window)

    def new_cache(self) -> DecoderCache:
        return DecoderCache(self.self_attn.new_cache())

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        key_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """cache: see MultiHeadAttention.forward."""
        if self.norm_first:
            branch, residual = self.forward_residual(
                x,
                None,
                memory,
                key_lengths=key_lengths,
                memory_lengths=memory_lengths,
                cache=cache,
            )
            return residual + branch
        own, kept = (None, None) if cache is None else (cache.self_attention, cache.memory)
        branch = self.self_attn(x, key_lengths=key_lengths, cache=own)
        x, _ = self.norm1(widened(branch, x), x, self.dropout1)
        branch = self.multihead_attn(x, memory, key_lengths=memory_lengths, cache=kept)
        x, _ = self.norm2(widened(branch, x), x, self.dropout2)
        x, _ = self.norm3(widened(self._feed_forward(x), x), x, self.dropout3)
        return x

    def forward_residual(
        self,
        branch: Tensor,
        residual: Tensor | None,
        memory: Tensor,
        *,
        key_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pre-norm only: from the stream branch + residual to the next (branch, residual)."""
        normed, residual = self.norm1(branch, residual)
        own, kept = (None, None) if cache is None else (cache.self_attention, cache.memory)
        branch = self.self_attn(normed, key_lengths=key_lengths, cache=own)
        normed, residual = self.norm2(branch, residual, self.dropout1)
        branch = self.multihead_attn(normed, memory, key_lengths=memory_lengths, cache=kept)
        normed, residual = self.norm3(branch, residual, self.dropout2)
        return self.dropout3(self._feed_forward(normed)), residual

    def _feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)


class _Stack(nn.Module):
    """Layers one after another, then an optional norm; names as in torch.nn's stacks."""

    def __init__(self, layers: Iterable[nn.Module], norm: AddLayerNorm | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        orders = {layer.norm_first for layer in self.layers}
        if len(orders) != 1:
            raise ValueError(f"layers must be at least one and of one norm_first, got {orders}")
        self.norm_first = orders.pop()

    def _run(
        self, x: Tensor, *memory: Tensor, caches: Sequence[Any] | None, **lengths: Tensor | None
    ) -> Tensor:
        layers = cast(Sequence[Any], self.layers)
        caches = [None] * len(layers) if caches is None else caches
        if len(caches) != len(layers):
            raise ValueError(
                f"caches must be one per layer, that is {len(layers)}, got {len(caches)}"
            )
        if self.norm_first:
            branch: Tensor = x
            residual: Any = None
            for layer, cache in zip(layers, caches, strict=True):
                branch, residual = layer.forward_residual(
                    branch, residual, *memory, cache=cache, **lengths
                )
            return residual + branch if self.norm is None else self.norm(branch, residual)[0]
        for layer, cache in zip(layers, caches, strict=True):
            x = layer(x, *memory, cache=cache, **lengths)
        return x if self.norm is None else self.norm(x)[0]


class TransformerEncoder(_Stack):
    """A stack of TransformerEncoderLayer, with an optional norm at its end."""

    @classmethod
    def from_torch(
        cls, module: nn.TransformerEncoder, *, causal: bool = False, window: Window = None
    ) -> TransformerEncoder:
        """A copy of `module` with its own parameters; inputs are batch-first, whatever it had."""
        layers = [
            TransformerEncoderLayer.from_torch(layer, causal=causal, window=window)
            for layer in module.layers
        ]
        return cls(layers, _copy_norm(module.norm))

    def new_caches(self) -> list[KVCache]:
        """Empty caches, one per layer, to generate with; the layers must be causal."""
        return [cast(TransformerEncoderLayer, layer).new_cache() for layer in self.layers]

    def forward(
        self,
        x: Tensor,
        *,
        key_lengths: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """caches: see MultiHeadAttention.forward."""
        return self._run(x, caches=caches, key_lengths=key_lengths)


class TransformerDecoder(_Stack):
    """A stack of TransformerDecoderLayer, with an optional norm at its end."""

    @classmethod
    def from_torch(
        cls, module: nn.TransformerDecoder, *, causal: bool = True, window: Window = None
    ) -> TransformerDecoder:
        """A copy of `module` with its own parameters; inputs are batch-first, whatever it had."""
        layers = [
            TransformerDecoderLayer.from_torch(layer, causal=causal, window=window)
            for layer in module.layers
        ]
        return cls(layers, _copy_norm(module.norm))

    def new_caches(self) -> list[DecoderCache]:
        """Empty caches, one per layer, to generate with; the layers must be causal."""
        return [cast(TransformerDecoderLayer, layer).new_cache() for layer in self.layers]

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        key_lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        caches: Sequence[DecoderCache] | None = None,
    ) -> Tensor:
        """caches: see MultiHeadAttention.forward."""
        return self._run(
            x, memory, caches=caches, key_lengths=key_lengths, memory_lengths=memory_lengths
        )


_Layer = TypeVar("_Layer", TransformerEncoderLayer, TransformerDecoderLayer)


def _copy_norm(norm: Any) -> AddLayerNorm | None:
    return None if norm is None else AddLayerNorm.from_torch(norm)


def _copy_layer(cls: type[_Layer], module: Any, *, causal: bool, window: Window) -> _Layer:
    """Both layer classes: torch's constructor options read back from its module, then the state."""
    weight = module.linear1.weight
    layer = cls(
        module.self_attn.embed_dim,
        module.self_attn.num_heads,
        hidden_dim=module.linear1.out_features,
        causal=causal,
        window=window,
        activation=copy.deepcopy(module.activation),
        dropout=module.dropout.p,
        attention_dropout=module.self_attn.dropout,
        norm_first=module.norm_first,
        eps=module.norm1.eps,
        bias=module.linear1.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    layer.load_state_dict(module.state_dict())
    return layer.train(module.training)
