"""A text classifier: N vectors in, one label out, through attention pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.layers import AttentionPooling
from leedl_fast.models.sequence_encoder import SequenceEncoder, SequenceEncoderConfig


@dataclass(frozen=True, kw_only=True)
class TextClassifierConfig(SequenceEncoderConfig):
    """Sizes and options of a TextClassifier: those of its SequenceEncoder, and these.

    num_classes: number of different labels.
    pooling: "attention", with the encoder's score and normalizer, or "mean" for comparison.
    """

    num_classes: int
    pooling: Literal["attention", "mean"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        if self.pooling not in ("attention", "mean"):
            raise ValueError(f'pooling must be "attention" or "mean", got {self.pooling!r}')


class TextClassifier(nn.Module):
    """The encoder, one vector of all positions, and a linear layer.

    position_table: see SequenceEncoder.
    """

    def __init__(self, config: TextClassifierConfig, position_table: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = SequenceEncoder(config, position_table)
        self.pooling = (
            AttentionPooling(
                config.embed_dim,
                config.num_heads,
                score=config.score,
                normalizer=config.normalizer,
            )
            if config.pooling == "attention"
            else MeanPooling()
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.embed_dim, config.num_classes)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (batch, num_classes); tokens and lengths: see SequenceEncoder."""
        hidden = self.encoder(tokens, lengths)
        return self.head(self.dropout(self.pooling(hidden, key_lengths=lengths)))

    def loss(self, tokens: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats; targets int64 (batch,)."""
        return F.cross_entropy(self(tokens, lengths), targets)


class MeanPooling(nn.Module):
    """The mean of the vectors before a sample's length."""

    def forward(self, x: Tensor, *, key_lengths: Tensor | None = None) -> Tensor:
        """(batch, seqlen, embed_dim) -> (batch, embed_dim)."""
        if key_lengths is None:
            return x.mean(dim=1)
        seen = torch.arange(x.shape[1], device=x.device) < key_lengths[:, None]
        total = (x * seen[:, :, None].to(x.dtype)).sum(dim=1)
        return total / key_lengths[:, None].to(x.dtype)
