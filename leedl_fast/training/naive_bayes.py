"""Naive Bayes, what a text classifier has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def naive_bayes_accuracy(
    train: Sequence[tuple[Tensor, int]],
    held_out: Sequence[tuple[Tensor, int]],
    *,
    num_features: int,
    num_classes: int,
) -> float:
    """Share of `held_out` that multinomial naive Bayes gets right, fitted on `train`.

    Each example is the numbers of the features that it has, int64 (any,), and its class. Counts are
    one larger than they are (Laplace).

    Book: Manning, Raghavan and Schütze, "Introduction to Information Retrieval", section 13.2.
    """
    counts = torch.ones(num_features, num_classes, dtype=torch.float64)
    labels = torch.tensor([label for _, label in train])
    for features, label in train:
        counts[:, label].index_add_(0, features, torch.ones(len(features), dtype=torch.float64))
    log_probabilities = (counts / counts.sum(dim=0)).log()
    prior = labels.bincount(minlength=num_classes).double().log()
    right = sum(
        int((log_probabilities[features].sum(dim=0) + prior).argmax()) == label
        for features, label in held_out
    )
    return right / len(held_out)
