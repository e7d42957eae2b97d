"""What a training run computes, apart from what trains it: read without PyTorch or Lightning."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leedl_fast.models.gpt import GPTConfig


@dataclass(frozen=True)
class TrainConfig:
    """The same config gives the same losses.

    data is a text file, or None for the Python documentation. context, layers, heads, heads_k,
    width, window and dropout size the model (see GPTConfig). The learning rate rises over
    warmup_steps and falls along a cosine to a tenth at the last of `steps`.
    """

    data: str | None = None
    steps: int = 1000
    batch_size: int = 16
    context: int = 256
    layers: int = 4
    heads: int = 4
    heads_k: int | None = None
    width: int = 128
    window: int | None = 64
    dropout: float = 0.0
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    seed: int = 0
    validate_every: int = 100
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "context", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "gradient_clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be finite and not negative, got {getattr(self, name)}"
                )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    def learning_rate_factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


# Whoever resumes may train longer, look more often, or have moved the text: nothing else may
# change, or the run would not be the one that it continues.
CHANGEABLE = frozenset({"data", "steps", "validate_every", "checkpoint_every"})


def resumed_config(about: dict[str, Any], step: int, changes: dict[str, Any]) -> TrainConfig:
    """The config of a run stopped after `step` steps, as `about` holds it, with `changes` to it."""
    config = TrainConfig(**about["config"])
    for name, value in changes.items():
        if name not in CHANGEABLE and value != getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)} in the checkpoint and must not change when "
                f"training resumes, got {value}"
            )
    config = dataclasses.replace(config, **changes)
    if config.steps <= step:
        raise ValueError(
            f"steps must be more than the {step} that the checkpoint has done, got {config.steps}"
        )
    return config


def gpt_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    from leedl_fast.models.gpt import GPTConfig

    return GPTConfig(
        vocab_size=vocab_size,
        context_length=config.context,
        num_layers=config.layers,
        num_heads=config.heads,
        num_heads_k=config.heads_k,
        embed_dim=config.width,
        window=config.window,
        dropout=config.dropout,
    )
