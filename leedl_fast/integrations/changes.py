"""What a library's integration would replace in a model."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

from torch import nn


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Change:
    """One module that is replaced, or left as it is for a reason.

    path: its name inside the model, "" for the model itself. was: what it is. now: what takes its
    place, "" where it is left. reason: why it is left, "" where it is replaced. apply and undo: do
    so; undo leaves the module as it was before.
    """

    path: str
    was: str
    now: str = ""
    reason: str = ""
    apply: Callable[[], None] = _nothing
    undo: Callable[[], None] = _nothing


def new_forward(path: str, module: nn.Module, now: str, forward: Callable) -> Change:
    """`module` keeps its class, its parameters and its hooks, and calls `forward` instead."""

    def apply() -> None:
        module.forward = MethodType(forward, module)

    def undo() -> None:
        del module.forward

    return Change(path, f"torch.nn.{type(module).__name__}", now, apply=apply, undo=undo)
