"""`patch` puts the fused kernels into a model that is there already, `unpatch` takes them out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from weakref import WeakKeyDictionary, ref

from torch import nn

from leedl_fast.integrations.changes import Change

# A model of a library means that the library has been imported.
LIBRARIES = {"torch": "torch_nn", "transformers": "transformers", "diffusers": "diffusers"}

# By model; nothing here keeps a model or a part of it alive.
_applied: WeakKeyDictionary[nn.Module, list[tuple[ref[nn.Module], Change]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class PatchReport:
    """replaced: what `patch` has put kernels into. left: what it knows, and why it did not."""

    replaced: tuple[Change, ...]
    left: tuple[Change, ...]

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return "nothing in this model has a fused kernel"
        lines = [f"{_name(c)}: {c.was} -> {c.now}" for c in self.replaced]
        lines += [f"{_name(c)}: {c.was} left as it is: {c.reason}" for c in self.left]
        return "\n".join(lines)


def _name(change: Change) -> str:
    return change.path or "the model"


def patch(model: nn.Module) -> PatchReport:
    """Replace what has a fused kernel in a model of torch.nn, transformers or diffusers, in place.

    Parameters, state dicts, hooks and classes stay what they are; `unpatch` undoes it. A second
    call finds what has been added since. `print(patch(model))` says what was done.

    torch.nn: MultiheadAttention (unless a call asks for weights), TransformerEncoderLayer and
    TransformerDecoderLayer, and so all that is made of them. transformers: the attention of every
    model that goes through its attention interface. diffusers: the attention of its models.

    Raises:
        TypeError: model is no torch.nn.Module.
    """
    _check(model)
    found = list(_changes(model))
    replaced = [change for change in found if not change.reason]
    for change in replaced:
        module = model.get_submodule(change.path)
        change.apply(module)
        _applied.setdefault(model, []).append((ref(module), change))
    return PatchReport(tuple(replaced), tuple(change for change in found if change.reason))


def unpatch(model: nn.Module) -> None:
    """Undo every `patch(model)`.

    Raises:
        ValueError: `patch` has not been called with this very module.
    """
    _check(model)
    if model not in _applied:
        raise ValueError(f"model must have been patched, got a {type(model).__name__} that was not")
    for reference, change in reversed(_applied.pop(model)):
        module = reference()
        if module is not None:
            change.undo(module)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _changes(model: nn.Module) -> Iterator[Change]:
    for library, integration in LIBRARIES.items():
        if library in sys.modules:
            yield from import_module(f"leedl_fast.integrations.{integration}").changes(model)
