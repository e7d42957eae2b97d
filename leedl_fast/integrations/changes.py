"""What a library's integration would replace in a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn


def _nothing(_: nn.Module) -> None:
    pass


@dataclass(frozen=True)
class Change:
    """One module that is replaced, or left as it is for a reason.

    path: its name inside the model, "" for the model itself. was: what it is. now: what takes its
    place, "" where it is left. reason: why it is left, "" where it is replaced. apply and undo: do
    so to the module, which a Change does not hold; undo leaves it as it was before.
    """

    path: str
    was: str
    now: str = ""
    reason: str = ""
    apply: Callable[[Any], None] = _nothing
    undo: Callable[[Any], None] = _nothing


def new_forward(path: str, was: str, now: str, forward: Callable) -> Change:
    """The module keeps its class, its parameters and its hooks, and calls `forward` instead: a
    partial function, which copies and pickles with the module.
    """

    def apply(module: nn.Module) -> None:
        module.forward = partial(forward, module)

    def undo(module: nn.Module) -> None:
        if getattr(vars(module).get("forward"), "func", None) is forward:
            del module.forward  # another one that has been set since is somebody else's

    return Change(path, was, now, apply=apply, undo=undo)
