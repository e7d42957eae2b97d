"""BERT: a Transformer encoder that learns from text by filling blanks, then other tasks from it.

Papers: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding"; sentence order: Lan et al., "ALBERT: A Lite BERT". The heads of fine-tuning stand in
`bert_heads.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.layers import AddLayerNorm, TransformerEncoder, TransformerEncoderLayer
from leedl_fast.layers.feed_forward import activation_function
from leedl_fast.ops.linear_cross_entropy import IGNORED, linear_cross_entropy


@dataclass(frozen=True)
class BERTConfig:
    """Sizes and options of a BERT.

    vocab_size: number of different tokens, those for [CLS], [SEP], [MASK] and padding included.
    max_length: number of positions.
    num_segments: number of different segments: the first and the second sentence of a pair.
    num_layers, num_heads, embed_dim: sizes of the encoder.
    hidden_dim: width of the feed-forward networks; None means 4 * embed_dim.
    window: how many tokens on each side a token sees in each layer; None means all of them.
    positions: "learned", a vector per position as in the paper, or "rotary", which every layer
        turns its queries and keys by (see RotaryPositionalEncoding).
    norm_first: pre-norm layers; False gives the paper's post-norm ones.
    activation: of the feed-forward networks and of the head, see FeedForward; a name.
    eps: see AddLayerNorm.
    dropout: probability of dropping a value of the embedding or of a branch while training.
    attention_dropout: see `dropout` of MultiHeadAttention.
    """

    vocab_size: int
    max_length: int = 512
    num_segments: int = 2
    num_layers: int = 4
    num_heads: int = 4
    embed_dim: int = 128
    hidden_dim: int | None = None
    window: int | None = None
    positions: Literal["learned", "rotary"] = "learned"
    norm_first: bool = False
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "max_length",
            "num_segments",
            "num_layers",
            "num_heads",
            "embed_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.positions not in ("learned", "rotary"):
            raise ValueError(f'positions must be "learned" or "rotary", got {self.positions!r}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class BERTEmbeddings(nn.Module):
    """The sum of token, position and segment embeddings, normalised."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.token_embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position_embedding = (
            nn.Embedding(config.max_length, config.embed_dim)
            if config.positions == "learned"
            else None
        )
        self.segment_embedding = nn.Embedding(config.num_segments, config.embed_dim)
        self.norm = AddLayerNorm(config.embed_dim, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape (batch, seqlen), got {tuple(tokens.shape)}")
        seqlen = tokens.shape[1]
        if seqlen > self.max_length:
            raise ValueError(
                f"tokens must have at most max_length = {self.max_length} positions, got {seqlen}"
            )
        segments = torch.zeros_like(tokens) if segments is None else segments
        x = self.token_embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[:seqlen]
        normed, _ = self.norm(x, self.segment_embedding(segments))
        return self.dropout(normed)


class BERT(nn.Module):
    """Embeddings, the encoder, and the pooler, which reads the first token, [CLS]."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.embeddings = BERTEmbeddings(config)
        self.encoder = TransformerEncoder(
            [
                TransformerEncoderLayer(
                    width,
                    config.num_heads,
                    hidden_dim=config.hidden_dim,
                    window=config.window,
                    rotary=config.positions == "rotary",
                    activation=config.activation,
                    dropout=config.dropout,
                    activation_dropout=0.0,
                    attention_dropout=config.attention_dropout,
                    norm_first=config.norm_first,
                    eps=config.eps,
                )
                for _ in range(config.num_layers)
            ],
            AddLayerNorm(width, eps=config.eps) if config.norm_first else None,
        )
        self.pooler = nn.Linear(width, width)
        initialise(self)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """What every head reads: (batch, seqlen) int64 -> (batch, seqlen, embed_dim).

        segments: int64, the shape of tokens; all 0 by default. lengths: int64 (batch,); the tokens
        after a sample's length are never seen.
        """
        return self.encoder(self.embeddings(tokens, segments), key_lengths=lengths)

    def pooled(self, hidden: Tensor) -> Tensor:
        """One vector per sample, (batch, embed_dim), from what `forward` gave."""
        return torch.tanh(self.pooler(hidden[:, 0]))


class MaskedLanguageModelHead(nn.Module):
    """Which token stands at a place: a transformation, then the token embedding, transposed."""

    def __init__(self, config: BERTConfig, token_embedding: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(config.embed_dim, config.embed_dim)
        self.activation = activation_function(config.activation)
        self.norm = AddLayerNorm(config.embed_dim, eps=config.eps)
        self.decoder = nn.Linear(config.embed_dim, config.vocab_size)
        initialise(self)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = token_embedding.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits: (..., embed_dim) -> (..., vocab_size)."""
        return self.decoder(self._transformed(hidden))

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean over the targets that are not IGNORED, in nats; only their logits are made."""
        chosen = targets != IGNORED
        return linear_cross_entropy(
            self._transformed(hidden[chosen]),
            self.decoder.weight,
            targets[chosen],
            bias=self.decoder.bias,
        )

    def _transformed(self, hidden: Tensor) -> Tensor:
        return self.norm(self.activation(self.transform(hidden)))[0]


class MaskedLanguageModel(nn.Module):
    """BERT with the head that fills blanks."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.bert = BERT(config)
        self.masked_head = MaskedLanguageModelHead(config, self.bert.embeddings.token_embedding)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, seqlen, vocab_size) of the token that belongs at each place."""
        return self.masked_head(self.bert(tokens, segments, lengths))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        segments: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        return self.masked_head.loss(self.bert(tokens, segments, lengths), targets)


class BERTForPretraining(MaskedLanguageModel):
    """BERT with both heads of pre-training: blanks, and how two sentences belong together.

    The second is the paper's next-sentence prediction (class 1: the second sentence is another one)
    or ALBERT's sentence order (class 1: they are swapped), as the targets say.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.pair_head = nn.Linear(config.embed_dim, 2)
        initialise(self.pair_head)

    def pair_logits(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """(batch, 2)."""
        return self.pair_head(self.bert.pooled(self.bert(tokens, segments, lengths)))

    def losses(
        self,
        tokens: Tensor,
        targets: Tensor,
        pair_targets: Tensor,
        segments: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both in nats, of blanks and of pairs; pair_targets int64 (batch,)."""
        hidden = self.bert(tokens, segments, lengths)
        pair_logits = self.pair_head(self.bert.pooled(hidden))
        return self.masked_head.loss(hidden, targets), F.cross_entropy(pair_logits, pair_targets)


def initialise(module: nn.Module) -> None:
    """The paper's: matrices from a normal distribution of deviation 0.02, no biases."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def mask_tokens(
    tokens: Tensor,
    *,
    mask_token: int,
    replacements: tuple[int, int],
    maskable: Tensor,
    share: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Blanks to fill: (inputs, targets), both of the shape of tokens, int64.

    Of the tokens that are `maskable` (bool) a `share` is chosen, each on its own. Of the chosen
    80 % become mask_token, 10 % a token drawn from the range `replacements` (first, end), 10 %
    stay. targets holds what was at the chosen places, and IGNORED elsewhere: Devlin et al.,
    section 3.1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    draws = torch.rand((2, *tokens.shape), generator=generator)
    chosen = (draws[0] < share) & maskable
    random = torch.randint(*replacements, tuple(tokens.shape), generator=generator)
    inputs = tokens.masked_fill(chosen & (draws[1] < 0.8), mask_token)
    inputs = torch.where(chosen & (draws[1] >= 0.9), random, inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORED)
