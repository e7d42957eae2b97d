"""An encoder of sequences with the choices of the tutorial's chapter on self-attention: input,
positions, score, normalizer, window, and no attention at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.layers import (
    AddLayerNorm,
    FeedForward,
    KVCache,
    SinusoidalPositionalEncoding,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from leedl_fast.layers.attention import Normalizer, Score

Input = Literal["embedding", "one-hot"]
Positions = Literal["sinusoidal", "learned", "rotary", "given", "none"]


@dataclass(frozen=True, kw_only=True)
class SequenceEncoderConfig:
    """Sizes and options of a SequenceEncoder.

    vocab_size: number of different pieces, piece 0 included, which is nothing.
    input: "embedding" looks the vectors of pieces up; "one-hot" makes one-hot vectors, and a matrix
        makes those embed_dim wide: the same function, in memory and time that grow with vocab_size.
    positions: "sinusoidal", "learned" or "given" (a table of the user's), a vector per position
        that is added to the token's; "rotary", which every layer turns its queries and keys by (see
        RotaryPositionalEncoding); or "none".
    max_length: number of positions.
    num_layers, num_heads, embed_dim: sizes of the layers; with num_layers=0 there are none.
    hidden_dim: width of the feed-forward networks; None means 4 * embed_dim.
    attention: False leaves self-attention out, so that every token is seen alone.
    score, normalizer: see MultiHeadAttention.
    window: how many tokens on each side a token sees in each layer; None means all of them.
    dropout: probability of dropping a value of the input or of a branch while training.
    """

    vocab_size: int
    input: Input = "embedding"
    positions: Positions = "rotary"
    max_length: int = 128
    num_layers: int = 2
    num_heads: int = 4
    embed_dim: int = 128
    hidden_dim: int | None = None
    attention: bool = True
    score: Score = "dot"
    normalizer: Normalizer = "softmax"
    window: int | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_length", "num_heads", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_layers < 0:
            raise ValueError(f"num_layers must not be negative, got {self.num_layers}")
        for name, kind in (("input", Input), ("positions", Positions)):
            known = get_args(kind)
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class PieceEmbedding(nn.Module):
    """The sum of the vectors of a token's pieces; piece 0 has none."""

    def __init__(self, vocab_size: int, embed_dim: int, *, one_hot: bool) -> None:
        super().__init__()
        self.one_hot = one_hot
        self.weight = nn.Parameter(torch.empty(vocab_size, embed_dim))
        nn.init.normal_(self.weight, std=embed_dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (batch, seqlen, num_pieces) -> (batch, seqlen, embed_dim)."""
        if self.one_hot:
            ones = torch.ones_like(tokens, dtype=self.weight.dtype)
            vectors = ones.new_zeros(*tokens.shape[:2], len(self.weight))
            return vectors.scatter_add(2, tokens, ones)[..., 1:] @ self.weight[1:]
        flat = F.embedding_bag(tokens.flatten(0, 1), self.weight, mode="sum", padding_idx=0)
        return flat.unflatten(0, tokens.shape[:2])


class LearnedPositions(nn.Module):
    """x plus a vector per position."""

    def __init__(self, max_length: int, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, embed_dim))
        nn.init.normal_(self.weight, std=embed_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[1]]


class GivenPositions(nn.Module):
    """x plus the rows of a table that nothing learns."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table.detach().clone().to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]


class FeedForwardLayer(nn.Module):
    """A pre-norm encoder layer without its self-attention."""

    norm_first = True

    def __init__(self, embed_dim: int, hidden_dim: int | None, dropout: float) -> None:
        super().__init__()
        self.norm = AddLayerNorm(embed_dim)
        self.feed_forward = FeedForward(embed_dim, hidden_dim, activation="gelu", dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward_residual(
        self,
        branch: Tensor,
        residual: Tensor | None,
        *,
        key_lengths: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See TransformerEncoderLayer: no position sees another one, so the rest is not read."""
        normed, residual = self.norm(branch, residual)
        return self.dropout(self.feed_forward(normed)), residual


class SequenceEncoder(nn.Module):
    """Pieces, positions, and pre-norm layers with a norm at their end.

    position_table: (max_length, embed_dim), for positions="given" alone.
    """

    def __init__(self, config: SequenceEncoderConfig, position_table: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.embedding = PieceEmbedding(config.vocab_size, width, one_hot=config.input == "one-hot")
        self.positions = _positions(config, position_table)
        self.dropout = nn.Dropout(config.dropout)
        norm = AddLayerNorm(width)
        layers = [_layer(config) for _ in range(config.num_layers)]
        self.layers = TransformerEncoder(layers, norm) if layers else None

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(batch, seqlen) or, for tokens of several pieces, (batch, seqlen, num_pieces), int64
        -> (batch, seqlen, embed_dim).

        lengths: int64 (batch,); the tokens after a sample's length are never seen.
        """
        if tokens.dim() not in (2, 3):
            raise ValueError(
                "tokens must have shape (batch, seqlen) or (batch, seqlen, num_pieces), "
                f"got {tuple(tokens.shape)}"
            )
        seqlen, max_length = tokens.shape[1], self.config.max_length
        if seqlen > max_length:
            raise ValueError(
                f"tokens must have at most max_length = {max_length} positions, got {seqlen}"
            )
        x = self.embedding(tokens[..., None] if tokens.dim() == 2 else tokens)
        # Vaswani et al., section 3.4: as large as what positions add.
        x = self.dropout(self.positions(x * math.sqrt(self.config.embed_dim)))
        return x if self.layers is None else self.layers(x, key_lengths=lengths)


def _layer(config: SequenceEncoderConfig) -> nn.Module:
    if not config.attention:
        return FeedForwardLayer(config.embed_dim, config.hidden_dim, config.dropout)
    return TransformerEncoderLayer(
        config.embed_dim,
        config.num_heads,
        hidden_dim=config.hidden_dim,
        window=config.window,
        rotary=config.positions == "rotary",
        activation="gelu",
        dropout=config.dropout,
        norm_first=True,
        score=config.score,
        normalizer=config.normalizer,
    )


def _positions(config: SequenceEncoderConfig, table: Tensor | None) -> nn.Module:
    if (table is not None) != (config.positions == "given"):
        raise ValueError(
            'position_table must be given with positions "given", and only then, got '
            f"{'None' if table is None else 'a table'} with {config.positions!r}"
        )
    max_length, width = config.max_length, config.embed_dim
    if table is not None:
        if table.shape != (max_length, width):
            raise ValueError(
                f"position_table must have shape (max_length, embed_dim) = {(max_length, width)}, "
                f"got {tuple(table.shape)}"
            )
        return GivenPositions(table)
    if config.positions == "learned":
        return LearnedPositions(max_length, width)
    if config.positions == "sinusoidal":
        return SinusoidalPositionalEncoding(width, max_length=max_length)
    return nn.Identity()
