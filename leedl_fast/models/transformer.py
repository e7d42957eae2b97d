"""The Transformer: sequence to sequence, an encoder and a decoder with cross-attention.

Paper: Vaswani et al., "Attention Is All You Need". Decoding stands in `decoding.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.layers import (
    AddLayerNorm,
    DecoderCache,
    SinusoidalPositionalEncoding,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from leedl_fast.models.pointing import CopyAttention, guided_attention_loss
from leedl_fast.ops.linear_cross_entropy import IGNORED, linear_cross_entropy

PAD, BEGIN, END = 0, 1, 2  # the first tokens of every vocabulary


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of a Transformer.

    source_vocab_size, target_vocab_size: numbers of different tokens, PAD, BEGIN and END included.
    max_length: number of positions that a source or a target may have.
    num_encoder_layers, num_decoder_layers, num_heads, embed_dim: sizes of both stacks.
    hidden_dim: width of the feed-forward networks; None means 4 * embed_dim.
    window: how many tokens on each side a token sees in self-attention; None means all of them.
    norm_first: pre-norm layers; False gives the paper's post-norm ones.
    dropout: probability of dropping a value of an embedding or of a branch while training.
    autoregressive: the decoder reads its own output, from left to right. False: it reads BEGIN at
        every position, sees both sides, and gives all tokens at once; a classifier that reads the
        encoder's output says how many (Gu et al., "Non-Autoregressive Neural Machine Translation").
    copying: the decoder can also point at a source token, which its vocabulary must share
        (See et al., "Get To The Point: Summarization with Pointer-Generator Networks").
    """

    source_vocab_size: int
    target_vocab_size: int
    max_length: int = 128
    num_encoder_layers: int = 3
    num_decoder_layers: int = 3
    num_heads: int = 4
    embed_dim: int = 128
    hidden_dim: int | None = None
    window: int | None = None
    norm_first: bool = True
    dropout: float = 0.1
    autoregressive: bool = True
    copying: bool = False

    def __post_init__(self) -> None:
        for name in (
            "max_length",
            "num_encoder_layers",
            "num_decoder_layers",
            "num_heads",
            "embed_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("source_vocab_size", "target_vocab_size"):
            if getattr(self, name) <= END:
                raise ValueError(f"{name} must be at least {END + 1}, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.copying and self.source_vocab_size != self.target_vocab_size:
            raise ValueError(
                "copying needs one vocabulary for source and target, got sizes "
                f"{self.source_vocab_size} and {self.target_vocab_size}"
            )
        if self.copying and not self.autoregressive:
            raise ValueError("copying needs autoregressive=True, got False")


class Transformer(nn.Module):
    """Embeddings, encoder, decoder, and a head tied to the target embedding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        options: dict[str, Any] = {
            "hidden_dim": config.hidden_dim,
            "window": config.window,
            "dropout": config.dropout,
            "norm_first": config.norm_first,
        }
        self.source_embedding = nn.Embedding(config.source_vocab_size, width)
        self.target_embedding = nn.Embedding(config.target_vocab_size, width)
        # One more position: BEGIN stands before a target of max_length.
        self.positions = SinusoidalPositionalEncoding(width, max_length=config.max_length + 1)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = TransformerEncoder(
            [
                TransformerEncoderLayer(width, config.num_heads, **options)
                for _ in range(config.num_encoder_layers)
            ],
            AddLayerNorm(width) if config.norm_first else None,
        )
        self.decoder = TransformerDecoder(
            [
                TransformerDecoderLayer(
                    width, config.num_heads, causal=config.autoregressive, **options
                )
                for _ in range(config.num_decoder_layers)
            ],
            AddLayerNorm(width) if config.norm_first else None,
        )
        self.head = nn.Linear(width, config.target_vocab_size, bias=False)
        self.copy = CopyAttention(width) if config.copying else None
        self.length_head = None if config.autoregressive else nn.Linear(width, config.max_length)
        self.reset_parameters()
        self.head.weight = self.target_embedding.weight

    def reset_parameters(self) -> None:
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=self.config.embed_dim**-0.5)

    def encode(self, source: Tensor, source_lengths: Tensor) -> Tensor:
        """The memory that the decoder reads: (batch, seqlen) int64 -> (batch, seqlen, embed_dim).

        source_lengths int64 (batch,): the tokens after a sample's length are never seen.
        """
        self._check_length("source", source, 0)
        x = self._embed(self.source_embedding, source, 0)
        return self.encoder(x, key_lengths=source_lengths)

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        source_lengths: Tensor,
        *,
        target_lengths: Tensor | None = None,
        caches: Sequence[DecoderCache] | None = None,
    ) -> Tensor:
        """What the head reads, (batch, seqlen, embed_dim): of tokens that begin with BEGIN.

        caches: of `decoder.new_caches()`; `target` then goes on where the earlier ones ended.
        target_lengths int64 (batch,), for a decoder that is not causal.
        """
        first = caches[0].self_attention.length if caches else 0
        self._check_length("target", target, first - 1)
        return self.decoder(
            self._embed(self.target_embedding, target, first),
            memory,
            key_lengths=target_lengths,
            memory_lengths=source_lengths,
            caches=caches,
        )

    def log_probabilities(
        self, hidden: Tensor, memory: Tensor, source: Tensor, source_lengths: Tensor
    ) -> Tensor:
        """Of each next token, from what `decode` gave: (batch, seqlen, target_vocab_size)."""
        logits = self.head(hidden)
        if self.copy is None:
            return logits.log_softmax(dim=-1)
        return self.copy(logits, hidden, memory, source, source_lengths)

    def forward(self, source: Tensor, source_lengths: Tensor, target: Tensor) -> Tensor:
        """Log-probabilities of each next token under teacher forcing; target begins with BEGIN."""
        memory = self.encode(source, source_lengths)
        hidden = self.decode(target, memory, source_lengths)
        return self.log_probabilities(hidden, memory, source, source_lengths)

    def loss(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target: Tensor,
        target_lengths: Tensor,
        *,
        label_smoothing: float = 0.0,
        sampling_probability: float = 0.0,
        guided_attention: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats per target token, END included.

        Args:
            source, source_lengths: see `encode`.
            target: (batch, seqlen) int64, without BEGIN, each sample's END its last token.
            target_lengths: int64 (batch,), END counted.
            label_smoothing: the share of the target distribution that is uniform.
            sampling_probability: of replacing a token that the decoder reads by its own likeliest
                one (scheduled sampling: Bengio et al. 2015; in two passes, the first without
                gradients: Mihaylova and Martins 2019). 0 is teacher forcing.
            guided_attention: weight of `guided_attention_loss` of the last decoder layer.
            generator: of scheduled sampling's draws.
        """
        if not 0 <= sampling_probability <= 1:
            raise ValueError(f"sampling_probability must be in [0, 1], got {sampling_probability}")
        if not guided_attention >= 0:
            raise ValueError(f"guided_attention must not be negative, got {guided_attention}")
        memory = self.encode(source, source_lengths)
        place = torch.arange(target.shape[1], device=target.device)
        targets = target.masked_fill(place >= target_lengths[:, None], IGNORED)
        if not self.config.autoregressive:
            begins = torch.full_like(target, BEGIN)
            hidden = self.decode(begins, memory, source_lengths, target_lengths=target_lengths)
            loss = self._token_loss(hidden, targets, label_smoothing)
            lengths = self.length_logits(memory, source_lengths)
            return loss + F.cross_entropy(lengths, target_lengths - 1)

        inputs = F.pad(target[:, :-1], (1, 0), value=BEGIN)
        if sampling_probability > 0:
            inputs = self._scheduled(
                inputs, memory, source, source_lengths, sampling_probability, generator
            )
        hidden = self.decode(inputs, memory, source_lengths)
        if self.copy is None:
            loss = self._token_loss(hidden, targets, label_smoothing)
        else:
            log_probabilities = self.log_probabilities(hidden, memory, source, source_lengths)
            loss = F.nll_loss(log_probabilities.flatten(0, 1), targets.flatten())
            if label_smoothing > 0:
                counted = (targets != IGNORED).to(loss.dtype)
                uniform = -(log_probabilities.mean(dim=-1) * counted).sum() / counted.sum()
                loss = (1 - label_smoothing) * loss + label_smoothing * uniform
        if guided_attention > 0:
            weights = self.cross_attention_weights(inputs, memory, source_lengths)
            guided = guided_attention_loss(weights, target_lengths, source_lengths)
            loss = loss + guided_attention * guided
        return loss

    def cross_attention_weights(
        self, inputs: Tensor, memory: Tensor, source_lengths: Tensor
    ) -> Tensor:
        """Of the last decoder layer: (batch, num_heads, seqlen_target, seqlen_source)."""
        attention = cast(TransformerDecoderLayer, self.decoder.layers[-1]).multihead_attn
        queries: list[Tensor] = []
        hook = attention.register_forward_pre_hook(
            lambda module, arguments: queries.append(arguments[0])
        )
        try:
            self.decode(inputs, memory, source_lengths)
        finally:
            hook.remove()
        return attention.attention_weights(queries[0], memory, key_lengths=source_lengths)

    @torch.no_grad()
    def _scheduled(
        self,
        inputs: Tensor,
        memory: Tensor,
        source: Tensor,
        source_lengths: Tensor,
        probability: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        """`inputs` with some tokens after BEGIN replaced by what the model takes for the likeliest
        there.
        """
        hidden = self.decode(inputs, memory, source_lengths)
        likeliest = self.log_probabilities(hidden, memory, source, source_lengths).argmax(dim=-1)
        own = torch.cat((inputs[:, :1], likeliest[:, :-1]), dim=1)
        draws = torch.rand(inputs.shape, generator=generator, device=inputs.device)
        draws[:, 0] = 1
        return torch.where(draws < probability, own, inputs)

    def length_logits(self, memory: Tensor, source_lengths: Tensor) -> Tensor:
        """Of the target's length - 1, from the mean of the memory: (batch, max_length)."""
        if self.length_head is None:
            raise ValueError("autoregressive must be False for a length, got True")
        place = torch.arange(memory.shape[1], device=memory.device)
        seen = (place < source_lengths[:, None]).to(memory.dtype)
        mean = (memory * seen[:, :, None]).sum(dim=1) / source_lengths[:, None]
        return self.length_head(mean)

    def _embed(self, embedding: nn.Embedding, tokens: Tensor, first: int) -> Tensor:
        x = embedding(tokens) * math.sqrt(self.config.embed_dim)
        return self.dropout(self.positions(x, offset=first))

    def _check_length(self, name: str, tokens: Tensor, before: int) -> None:
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape (batch, seqlen >= 1), got {tuple(tokens.shape)}"
            )
        length = before + tokens.shape[1]
        if length > self.config.max_length:
            raise ValueError(
                f"{name} must have at most max_length = {self.config.max_length} positions, "
                f"got {length}"
            )

    def _token_loss(self, hidden: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        return linear_cross_entropy(
            hidden,
            self.head.weight,
            targets,
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
        )
