"""GPT: a Transformer that predicts the next token, with full or truncated causal self-attention.

Papers: Radford et al., "Improving Language Understanding by Generative Pre-Training"; the pre-norm
order and the initialisation are those of "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leedl_fast.layers import AddLayerNorm, TransformerEncoder, TransformerEncoderLayer
from leedl_fast.ops import linear_cross_entropy


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and options of a GPT.

    vocab_size: number of different tokens.
    context_length: number of positions, the most tokens that the model sees at once.
    num_layers, num_heads, num_heads_k, embed_dim: num_heads_k=None means num_heads.
    window: how many tokens before its own a token sees in each layer; None means all of them.
    dropout: probability of dropping a value of the embedding or of a branch while training.
    """

    vocab_size: int
    context_length: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_heads_k: int | None = None
    embed_dim: int = 128
    window: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "num_layers", "num_heads", "embed_dim"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.window is not None and self.window < 0:
            raise ValueError(f"window must not be negative, got {self.window}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class GPT(nn.Module):
    """Token and position embedding, pre-norm layers, a norm, and a head tied to the embedding.

    A layer is the Transformer's *encoder* layer with a causal mask: what the literature calls
    decoder-only has no cross-attention left.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position_embedding = nn.Embedding(config.context_length, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        layers = [
            TransformerEncoderLayer(
                config.embed_dim,
                config.num_heads,
                num_heads_k=config.num_heads_k,
                causal=True,
                window=config.window,
                activation="gelu",
                dropout=config.dropout,
                norm_first=True,
            )
            for _ in range(config.num_layers)
        ]
        self.transformer = TransformerEncoder(layers, AddLayerNorm(config.embed_dim))
        self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.reset_parameters()
        self.head.weight = self.token_embedding.weight

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            # Each layer adds two branches to the stream: scaled so, its variance does not grow
            # with the number of layers.
            ends_branch = name.endswith(("out_proj.weight", "linear2.weight"))
            scale = math.sqrt(2 * self.config.num_layers) if ends_branch else 1.0
            nn.init.normal_(parameter, std=0.02 / scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each next token: (batch, seqlen) int64 -> (batch, seqlen, vocab_size)."""
        return self.head(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, without ever holding all logits; targets (batch,
        seqlen) are the next tokens.
        """
        return linear_cross_entropy(self.hidden(tokens), self.head.weight, targets)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads: (batch, seqlen, embed_dim)."""
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape (batch, seqlen), got {tuple(tokens.shape)}")
        seqlen = tokens.shape[1]
        if seqlen > self.config.context_length:
            raise ValueError(
                f"tokens must have at most context_length = {self.config.context_length} "
                f"positions, got {seqlen}"
            )
        x = self.token_embedding(tokens) + self.position_embedding.weight[:seqlen]
        return self.transformer(self.dropout(x))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue `tokens` (batch, seqlen), one (batch,) of new tokens at a time.

        temperature divides the logits, and 0 takes the likeliest token; top_k keeps the k likeliest
        tokens; top_p keeps the fewest likeliest tokens whose probabilities sum to at least top_p
        (Holtzman et al., "The Curious Case of Neural Text Degeneration").
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens must have shape (batch, seqlen >= 1), got {tuple(tokens.shape)}"
            )
        for _ in range(num_tokens):
            tokens = tokens[:, -self.config.context_length :]
            logits = self.head(self.hidden(tokens)[:, -1])  # (batch, vocab_size)
            next_tokens = sample_tokens(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            yield next_tokens
            tokens = torch.cat((tokens, next_tokens[:, None]), dim=1)


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row of `logits` (batch, vocab_size); see GPT.generate for the options."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The largest becomes 0 first, so that no temperature overflows.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probabilities, order = torch.softmax(scores, dim=-1).sort(descending=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        # A token stays while those before it have not reached top_p: the first one always does.
        before = probabilities.cumsum(dim=-1) - probabilities
        total = probabilities.sum(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(before >= top_p * total, 0)
    rank = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, rank)[:, 0]
