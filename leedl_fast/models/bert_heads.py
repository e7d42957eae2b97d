"""BERT fine-tuned: one class per text, per token or per pair of texts, and answers in a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.models.bert import BERT, initialise
from leedl_fast.ops.linear_cross_entropy import IGNORED


class FineTunedBERT(nn.Module):
    """BERT and a linear layer on what it gives, `num_classes` logits for each vector."""

    def __init__(self, bert: BERT, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(bert.config.embed_dim, num_classes)
        initialise(self.head)

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x, self.bert.config.dropout, self.training))


class BERTForClassification(FineTunedBERT):
    """A class for the whole input: a text (sentiment), or a pair of them told apart by `segments`
    (does the second follow from the first?). The head reads [CLS] through the pooler.
    """

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, num_classes)."""
        return self._logits(self.bert.pooled(self.bert(tokens, segments, lengths)))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        segments: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """targets: int64 (batch,)."""
        return F.cross_entropy(self(tokens, segments, lengths), targets)


class BERTForTagging(FineTunedBERT):
    """A class for every token (part of speech)."""

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, seqlen, num_classes)."""
        return self._logits(self.bert(tokens, segments, lengths))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        segments: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """targets: int64 (batch, seqlen), IGNORED where there is no tag."""
        logits = self(tokens, segments, lengths)
        return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED)


class BERTForSpan(FineTunedBERT):
    """Where the answer to a question stands: the products of every token with a vector for the
    first token of an answer, and with one for the last.
    """

    def __init__(self, bert: BERT) -> None:
        super().__init__(bert, num_classes=2)

    def forward(
        self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, 2, seqlen) of first and last; -inf outside segment 1, the text, if
        segments are given, and after a sample's length.
        """
        logits = self.head(self.bert(tokens, segments, lengths)).transpose(1, 2)
        outside = torch.zeros_like(tokens, dtype=torch.bool)
        if segments is not None:
            outside = outside | (segments != 1)
        if lengths is not None:
            place = torch.arange(tokens.shape[1], device=tokens.device)
            outside = outside | (place >= lengths[:, None])
        return logits.masked_fill(outside[:, None], -torch.inf)

    def loss(
        self,
        tokens: Tensor,
        spans: Tensor,
        segments: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """spans: int64 (batch, 2), the places of the first and the last token of the answer."""
        logits = self(tokens, segments, lengths)
        return F.cross_entropy(logits.flatten(0, 1), spans.flatten())

    @torch.no_grad()
    def answer(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        max_span: int = 30,
    ) -> Tensor:
        """The likeliest (first, last) with first <= last < first + max_span: int64 (batch, 2)."""
        if max_span < 1:
            raise ValueError(f"max_span must be at least 1, got {max_span}")
        first, last = self(tokens, segments, lengths).unbind(1)
        seqlen = tokens.shape[1]
        allowed = torch.ones(seqlen, seqlen, dtype=torch.bool, device=tokens.device)
        allowed = allowed.triu().tril(max_span - 1)
        scores = (first[:, :, None] + last[:, None]).masked_fill(~allowed, -torch.inf)
        best = scores.flatten(1).argmax(dim=1)
        return torch.stack((best // seqlen, best % seqlen), dim=1)
