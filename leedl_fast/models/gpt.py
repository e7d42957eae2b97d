"""GPT: a Transformer that predicts the next token, with full or truncated causal self-attention.

Papers: Radford et al., "Improving Language Understanding by Generative Pre-Training"; the pre-norm
order and the initialisation are those of "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from leedl_fast.layers import AddLayerNorm, KVCache, TransformerEncoder, TransformerEncoderLayer
from leedl_fast.ops.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and options of a GPT.

    vocab_size: number of different tokens.
    context_length: number of positions, the most tokens that the model sees at once. With
        positions="rotary" and a window there is no such limit: context_length is then no more than
        the length to train at.
    num_layers, num_heads, num_heads_k, embed_dim: num_heads_k=None means num_heads.
    hidden_dim: width of the feed-forward networks; None means 4 * embed_dim.
    window: how many tokens before its own a token sees in each layer; None means all of them.
    positions: "learned", a vector per position as in the papers, or "rotary", which every layer
        turns its queries and keys by (see RotaryPositionalEncoding).
    activation: of the feed-forward networks, see FeedForward; a name.
    eps: see AddLayerNorm.
    dropout: probability of dropping a value of the embedding or of a branch while training.
    attention_dropout: see `dropout` of MultiHeadAttention.
    """

    vocab_size: int
    context_length: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_heads_k: int | None = None
    embed_dim: int = 128
    hidden_dim: int | None = None
    window: int | None = None
    positions: Literal["learned", "rotary"] = "learned"
    activation: str = "gelu"
    eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "num_layers", "num_heads", "embed_dim"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.window is not None and self.window < 0:
            raise ValueError(f"window must not be negative, got {self.window}")
        if self.positions not in ("learned", "rotary"):
            raise ValueError(f'positions must be "learned" or "rotary", got {self.positions!r}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def is_unlimited(self) -> bool:
        """Whether a text of any length can be read, and gone on with, in memory that is flat."""
        return self.positions == "rotary" and self.window is not None


class GPT(nn.Module):
    """Token and position embedding, pre-norm layers, a norm, and a head tied to the embedding.

    A layer is the Transformer's *encoder* layer with a causal mask: what the literature calls
    decoder-only has no cross-attention left.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        layers = [
            TransformerEncoderLayer(
                config.embed_dim,
                config.num_heads,
                num_heads_k=config.num_heads_k,
                hidden_dim=config.hidden_dim,
                causal=True,
                window=config.window,
                rotary=config.positions == "rotary",
                activation=config.activation,
                dropout=config.dropout,
                activation_dropout=0.0,
                attention_dropout=config.attention_dropout,
                norm_first=True,
                eps=config.eps,
            )
            for _ in range(config.num_layers)
        ]
        norm = AddLayerNorm(config.embed_dim, eps=config.eps)
        self.transformer = TransformerEncoder(layers, norm)
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
        """Mean cross-entropy in nats per token, without ever holding all logits;
        targets (batch, seqlen) are the next tokens, or -100 where there is nothing to learn.
        """
        return linear_cross_entropy(self.hidden(tokens), self.head.weight, targets)

    def hidden(self, tokens: Tensor, *, caches: Sequence[KVCache] | None = None) -> Tensor:
        """What the head reads: (batch, seqlen, embed_dim).

        caches: of `transformer.new_caches()`; `tokens` then go on where the earlier ones ended.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape (batch, seqlen), got {tuple(tokens.shape)}")
        first = caches[0].length if caches else 0
        end = first + tokens.shape[1]
        if end > self.config.context_length and not self.config.is_unlimited:
            raise ValueError(
                f"tokens must have at most context_length = {self.config.context_length} "
                f"positions, got {end}"
            )
        x = self.token_embedding(tokens)
        if self.config.positions == "learned":
            x = x + self.position_embedding.weight[first:end]
        return self.transformer(self.dropout(x), caches=caches)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        end_token: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Continue `tokens` (batch, seqlen), one (batch,) of new tokens at a time.

        temperature divides the logits, and 0 takes the likeliest token; top_k keeps the k likeliest
        tokens; top_p keeps the fewest likeliest tokens whose probabilities sum to at least top_p
        (Holtzman et al., "The Curious Case of Neural Text Degeneration"). After end_token a sample
        is at its end, and repeats it until all are.

        Where context_length limits what the model sees, a text that outgrows it loses its first
        half context, and positions count from the new beginning: so the model sees at least the
        last half context, and reads it anew once in half a context. Otherwise no token is read
        twice. use_cache=False computes the same from the whole of what is seen, for each token.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens must have shape (batch, seqlen >= 1), got {tuple(tokens.shape)}"
            )
        seen = self._without_outgrown(tokens)
        unread = seen
        caches = self.transformer.new_caches() if use_cache else None
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(num_tokens):
            logits = self.head(self.hidden(unread, caches=caches)[:, -1])  # (batch, vocab_size)
            new = sample_tokens(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            if end_token is not None:
                new = new.masked_fill(ended, end_token)
                ended = new == end_token
            yield new
            if end_token is not None and ended.all():
                return
            unread = new[:, None]
            if caches is not None and self.config.is_unlimited:
                continue
            grown = torch.cat((seen, unread), dim=1)
            seen = self._without_outgrown(grown)
            if caches is None:
                unread = seen
            elif seen.shape[1] < grown.shape[1]:
                unread, caches = seen, self.transformer.new_caches()

    def _without_outgrown(self, tokens: Tensor) -> Tensor:
        """The part of a text that the model sees; its beginning moves by half contexts."""
        context = self.config.context_length
        outgrown = tokens.shape[1] - context
        if outgrown <= 0 or self.config.is_unlimited:
            return tokens
        half = max(1, context // 2)
        return tokens[:, half * -(-outgrown // half) :]


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
