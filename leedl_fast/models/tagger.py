"""A sequence tagger: N vectors in, N labels out, each from the whole sequence by self-attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from leedl_fast.models.sequence_encoder import SequenceEncoder, SequenceEncoderConfig
from leedl_fast.ops.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True, kw_only=True)
class TaggerConfig(SequenceEncoderConfig):
    """Sizes and options of a Tagger: those of its SequenceEncoder, and num_tags, the number of
    different labels.
    """

    num_tags: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_tags < 1:
            raise ValueError(f"num_tags must be at least 1, got {self.num_tags}")


class Tagger(nn.Module):
    """The encoder, and a linear layer at every position.

    position_table: see SequenceEncoder.
    """

    def __init__(self, config: TaggerConfig, position_table: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = SequenceEncoder(config, position_table)
        self.head = nn.Linear(config.embed_dim, config.num_tags)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (batch, seqlen, num_tags); tokens and lengths: see SequenceEncoder."""
        return self.head(self.encoder(tokens, lengths))

    def loss(self, tokens: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats over the targets (batch, seqlen) that are not IGNORED."""
        hidden = self.encoder(tokens, lengths)
        return linear_cross_entropy(hidden, self.head.weight, targets, bias=self.head.bias)
