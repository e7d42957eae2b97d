"""Which examples train, are held out or are shown, and in which order: formulas of a seed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Examples = TypeVar("Examples", Tensor, list)


def generator_of(seed: int, index: int) -> torch.Generator:
    """The random numbers of the part `index` (a batch, an epoch) of a run: those of no other."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def spread(examples: Examples, count: int) -> Examples:
    """`count` of the examples, evenly spaced from the first one on; all where there are fewer."""
    step = max(1, len(examples) // count)
    return examples[::step][:count]


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
    return torch.randperm(num_examples, generator=generator_of(seed, epoch)).tolist()


class LengthBatches:
    """Batches of examples of about one length, so that little of a batch is padding.

    GROUP batches of `shuffled_indices` are sorted by length together, and then come in an order of
    their own: a function of the arguments alone, so that training that resumes remembers nothing.
    """

    GROUP = 32

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self._groups: dict[int, list[list[int]]] = {}

    def __getitem__(self, index: int) -> list[int]:
        group, place = divmod(index, self.GROUP)
        if group not in self._groups:
            self._groups = {group: self._group(group)}
        return self._groups[group][place]

    def _group(self, group: int) -> list[list[int]]:
        size = self.batch_size
        shuffled = [
            i
            for index in range(group * self.GROUP, (group + 1) * self.GROUP)
            for i in shuffled_indices(len(self.lengths), size, seed=self.seed, index=index).tolist()
        ]
        shuffled.sort(key=lambda i: self.lengths[i])
        order = torch.randperm(self.GROUP, generator=generator_of(self.seed, group)).tolist()
        return [shuffled[place * size : (place + 1) * size] for place in order]
