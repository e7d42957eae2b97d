"""Models that read frames of sound: a class for every frame (N to N), or one for all (N to 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.layers import (
    AddLayerNorm,
    AttentionPooling,
    SinusoidalPositionalEncoding,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from leedl_fast.ops.linear_cross_entropy import IGNORED

Positions = Literal["sinusoidal", "rotary", "none"]


@dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """Sizes and options of a FrameEncoder and of what stands on it.

    num_features: numbers in a frame. num_classes: number of different labels.
    max_length: number of frames that are read at once.
    window: how many frames on each side a frame sees in each layer (truncated self-attention); None
        means all of them, 0 only itself: no attention, with the same parameters.
    positions: "sinusoidal", added to the frames; "rotary", which every layer turns its queries and
        keys by (see RotaryPositionalEncoding); or "none".
    num_layers, num_heads, embed_dim: sizes of the encoder.
    hidden_dim: width of the feed-forward networks; None means 4 * embed_dim.
    dropout: probability of dropping a value of the input or of a branch while training.
    """

    num_features: int
    num_classes: int
    max_length: int = 200
    window: int | None = None
    positions: Positions = "sinusoidal"
    num_layers: int = 2
    num_heads: int = 4
    embed_dim: int = 64
    hidden_dim: int | None = None
    dropout: float = 0.3

    def __post_init__(self) -> None:
        for name in ("num_features", "max_length", "num_layers", "num_heads", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        if self.positions not in get_args(Positions):
            raise ValueError(
                f"positions must be one of {get_args(Positions)}, got {self.positions!r}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class FrameEncoder(nn.Module):
    """Standardised frames, a linear layer, positions, and a pre-norm Transformer encoder.

    mean, deviation: (num_features,), of the frames to train on; a checkpoint holds them. None means
    0 and 1.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, config: SpeechConfig, mean: Tensor | None = None, deviation: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        width, shape = config.embed_dim, (config.num_features,)
        for name, value in (("mean", mean), ("deviation", deviation)):
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        self.register_buffer("mean", torch.zeros(shape) if mean is None else mean.clone())
        self.register_buffer(
            "deviation", torch.ones(shape) if deviation is None else deviation.clone()
        )
        self.embedding = nn.Linear(config.num_features, width)
        self.positions = (
            SinusoidalPositionalEncoding(width, max_length=config.max_length)
            if config.positions == "sinusoidal"
            else nn.Identity()
        )
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = TransformerEncoder(
            [
                TransformerEncoderLayer(
                    width,
                    config.num_heads,
                    hidden_dim=config.hidden_dim,
                    window=config.window,
                    rotary=config.positions == "rotary",
                    activation="gelu",
                    dropout=config.dropout,
                    norm_first=True,
                )
                for _ in range(config.num_layers)
            ],
            AddLayerNorm(width),
        )

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(batch, seqlen, num_features) -> (batch, seqlen, embed_dim).

        lengths: int64 (batch,); the frames after a sample's length are never seen.
        """
        num_features, max_length = self.config.num_features, self.config.max_length
        if frames.dim() != 3 or frames.shape[2] != num_features:
            raise ValueError(
                f"frames must have shape (batch, seqlen, {num_features}), got {tuple(frames.shape)}"
            )
        if frames.shape[1] > max_length:
            raise ValueError(
                f"frames must be at most max_length = {max_length}, got {frames.shape[1]}"
            )
        x = self.embedding((frames - self.mean) / self.deviation)
        return self.encoder(self.dropout(self.positions(x)), key_lengths=lengths)


class SpeechClassifier(nn.Module):
    """What both classifiers have: the encoder, dropout and a linear layer. mean, deviation: see
    FrameEncoder.
    """

    def __init__(
        self, config: SpeechConfig, mean: Tensor | None = None, deviation: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = FrameEncoder(config, mean, deviation)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.embed_dim, config.num_classes)


class FrameClassifier(SpeechClassifier):
    """N to N: a class for every frame, such as who speaks."""

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (batch, seqlen, num_classes); frames and lengths: see FrameEncoder."""
        return self.head(self.dropout(self.encoder(frames, lengths)))

    def loss(self, frames: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats; targets int64 (batch, seqlen), IGNORED where none is."""
        return F.cross_entropy(self(frames, lengths).transpose(1, 2), targets, ignore_index=IGNORED)


class UtteranceClassifier(SpeechClassifier):
    """N to 1: a class for all frames together, such as whose utterance it is, by attention
    pooling.
    """

    def __init__(
        self, config: SpeechConfig, mean: Tensor | None = None, deviation: Tensor | None = None
    ) -> None:
        super().__init__(config, mean, deviation)
        self.pooling = AttentionPooling(config.embed_dim, config.num_heads)

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (batch, num_classes); frames and lengths: see FrameEncoder."""
        hidden = self.encoder(frames, lengths)
        return self.head(self.dropout(self.pooling(hidden, key_lengths=lengths)))

    def loss(self, frames: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats; targets int64 (batch,)."""
        return F.cross_entropy(self(frames, lengths), targets)
