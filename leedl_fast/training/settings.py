"""What a training run computes, apart from what trains it: read without PyTorch or Lightning."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Settings:
    """What every model's training has; a task adds fields and changes defaults in a subclass.

    data is a file or folder of the user's, or None for the task's own data set. The learning rate
    rises over warmup_steps and falls along a cosine to a tenth at the last of `steps`.
    gradient_clip is the largest norm of the gradient, 0 for any. ema_decay keeps an average of the
    model beside it, and 0 none. precision is one of Lightning's.
    """

    data: str | None = None
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    ema_decay: float = 0.0
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "64-true"] = "32-true"
    seed: int = 0
    validate_every: int = 100
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "gradient_clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be finite and not negative, got {getattr(self, name)}"
                )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    def learning_rate_factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class RunConfig:
    """A training run: the same one gives the same losses.

    model: fields of the model's config that are not as the task has them.
    """

    task: str
    settings: Settings
    model: Mapping[str, Any]


# Whoever resumes may train longer, look more often, or have moved the data: nothing else may
# change, or the run would not be the one that it continues.
CHANGEABLE = frozenset({"data", "steps", "validate_every", "checkpoint_every"})


def settable_fields(config: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a config that have a default: the others follow from the data."""
    return {
        field.name: field
        for field in dataclasses.fields(config)
        if not (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
    }


def parse_changes(changes: Iterable[str], *configs: type) -> dict[str, Any]:
    """The values of texts key=value, each of its field's type in one of the `configs`."""
    hints = {
        name: hint
        for config in configs
        for name, hint in typing.get_type_hints(config).items()
        if name in settable_fields(config)
    }
    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        name = name.strip()
        if not equals:
            raise ValueError(f"--set must be key=value, got {change!r}")
        if name not in hints:
            raise ValueError(f"--set must name one of {', '.join(sorted(hints))}, got {name!r}")
        values[name] = _parse(name, text.strip(), hints[name])
    return values


def _parse(name: str, text: str, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _parse(name, text, hint)
    if origin is Literal:
        if text not in arguments:
            raise ValueError(f"{name} must be one of {', '.join(arguments)}, got {text!r}")
        return text
    if origin is tuple:
        return tuple(_parse(name, part.strip(), arguments[0]) for part in text.split(","))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return text.lower() == "true"
    if hint is str:
        return text
    try:
        return hint(text)
    except ValueError:
        kind = {int: "an integer", float: "a number"}[hint]
        raise ValueError(f"{name} must be {kind}, got {text!r}") from None


def run_config(
    task: str, settings: type[Settings], model: type, changes: Mapping[str, Any]
) -> RunConfig:
    """`changes` are fields of the settings and of the model's config, mixed."""
    known_settings, known_model = settable_fields(settings), settable_fields(model)
    unknown = set(changes) - set(known_settings) - set(known_model)
    if unknown:
        known = sorted(set(known_settings) | set(known_model))
        raise ValueError(f"{task} has the options {', '.join(known)}, got {sorted(unknown)}")
    return RunConfig(
        task,
        settings(**{name: value for name, value in changes.items() if name in known_settings}),
        {name: value for name, value in changes.items() if name in known_model},
    )


def changed_run(run: RunConfig, step: int, changes: Mapping[str, Any]) -> RunConfig:
    """The run of a checkpoint with `step` steps done, with `changes` to it."""
    fields = dataclasses.asdict(run.settings) | dict(run.model)
    for name, value in changes.items():
        if name not in CHANGEABLE and (name not in fields or value != fields[name]):
            raise ValueError(
                f"{name} is {fields.get(name, 'not set')} in the checkpoint and must not change "
                f"when training resumes, got {value}"
            )
    kept = {name: value for name, value in changes.items() if name in CHANGEABLE}
    settings = dataclasses.replace(run.settings, **kept)
    if settings.steps <= step:
        raise ValueError(
            f"steps must be more than the {step} that the checkpoint has done, got {settings.steps}"
        )
    return RunConfig(run.task, settings, run.model)
