"""Which examples train and which are held out, and in which order: formulas of a seed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def split_indices(
    num_examples: int, *, held_out: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out, int64, both rising; at least one of each."""
    if num_examples < 2:
        raise ValueError(f"data must have at least 2 examples to split, got {num_examples}")
    num_held_out = min(max(1, round(num_examples * held_out)), num_examples - 1)
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    return order[num_held_out:].sort().values, order[:num_held_out].sort().values


def shuffled_indices(num_examples: int, batch_size: int, *, seed: int, index: int) -> Tensor:
    """The examples of batch number `index`, int64 (batch_size,).

    Every epoch goes through all examples in an order of its own; a batch may end one epoch and
    begin the next. A function of its arguments alone: training that resumes remembers nothing.
    """
    examples = []
    for place in range(index * batch_size, (index + 1) * batch_size):
        epoch, position = divmod(place, num_examples)
        examples.append(_order(num_examples, seed, epoch)[position])
    return torch.tensor(examples)


@functools.lru_cache(maxsize=4)
def _order(num_examples: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_examples, generator=generator).tolist()
