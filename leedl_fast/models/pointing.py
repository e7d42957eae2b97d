"""Attention whose weights are wanted: a decoder that copies, and one that should read in order."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def guided_attention_loss(
    weights: Tensor, query_lengths: Tensor, key_lengths: Tensor, *, sigma: float = 0.2
) -> Tensor:
    """Mean over the queries of `sum_j weights[i, j] (1 - exp(-(i / N - j / M)^2 / (2 sigma^2)))`:
    small where attention goes from left to right, as in speech.

    Args:
        weights: (batch, num_heads, seqlen_q, seqlen_k), each row with the sum 1.
        query_lengths, key_lengths: int64 (batch,), N and M; queries from N on do not count.
        sigma: how far from the diagonal costs little, as a share of the length.

    Paper: Tachibana et al., "Efficiently Trainable Text-to-Speech System Based on Deep
    Convolutional Networks with Guided Attention", section 4.1.
    """
    seqlen_q, seqlen_k = weights.shape[2:]
    query = torch.arange(seqlen_q, device=weights.device)
    key = torch.arange(seqlen_k, device=weights.device)
    distance = (query / query_lengths[:, None])[:, :, None] - (key / key_lengths[:, None])[:, None]
    cost = 1 - torch.exp(-(distance**2) / (2 * sigma**2))  # (batch, seqlen_q, seqlen_k)
    rows = (weights * cost[:, None].to(weights.dtype)).sum(dim=-1).mean(dim=1)
    counted = (query < query_lengths[:, None]).to(weights.dtype)
    return (rows * counted).sum() / counted.sum()


class CopyAttention(nn.Module):
    """A mixture of the vocabulary's distribution and one over the source's own tokens.

    `p(token) = g softmax(logits)[token] + (1 - g) sum_(j: source_j = token) a_j`, with a the
    weights of one more attention to the memory and g = sigmoid(gate(hidden)).

    Paper: See et al., "Get To The Point: Summarization with Pointer-Generator Networks",
    equation 9.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(embed_dim, embed_dim, bias=False)
        self.key = nn.Linear(embed_dim, embed_dim, bias=False)
        self.gate = nn.Linear(embed_dim, 1)

    def forward(
        self, logits: Tensor, hidden: Tensor, memory: Tensor, source: Tensor, source_lengths: Tensor
    ) -> Tensor:
        """Log-probabilities (batch, seqlen, vocab_size) from logits of that shape, hidden
        (batch, seqlen, embed_dim), memory (batch, seqlen_source, embed_dim), source int64
        (batch, seqlen_source), source_lengths int64 (batch,).
        """
        scores = self.query(hidden) @ self.key(memory).mT / math.sqrt(hidden.shape[2])
        log_weights = _hide(scores[:, None], source_lengths)[:, 0].log_softmax(dim=-1)
        gate = self.gate(hidden)
        generated = logits.log_softmax(dim=-1) + nn.functional.logsigmoid(gate)
        places = source[:, None].expand_as(log_weights)
        copied = torch.zeros_like(logits).scatter_add(2, places, log_weights.exp())
        # The least positive number, in the place of log(0), loses against any other.
        tiny = torch.finfo(copied.dtype).tiny
        return torch.logaddexp(
            generated, copied.clamp(min=tiny).log() + nn.functional.logsigmoid(-gate)
        )


def _hide(scores: Tensor, key_lengths: Tensor) -> Tensor:
    """Scores (batch, heads, seqlen_q, seqlen_k) of keys after a sample's length become -inf."""
    key = torch.arange(scores.shape[3], device=scores.device)
    return scores.masked_fill((key >= key_lengths[:, None])[:, None, None], -math.inf)
