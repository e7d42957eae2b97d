"""The compiled modules of csrc/cpu, one per instruction set, and which of them is in use."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch

from leedl_fast import config
from leedl_fast.backends.compiled import load

ISAS = ("avx512", "avx2", "baseline")  # the best first


@cache
def modules() -> dict[str, ModuleType]:
    """The compiled modules that this processor runs, by instruction set, the best first."""
    return {isa: module for isa in ISAS if not isinstance(module := _load(isa), str)}


@cache
def reasons() -> dict[str, str]:
    """Why each of the other instruction sets cannot be used here."""
    return {isa: reason for isa in ISAS if isinstance(reason := _load(isa), str)}


@cache
def _load(isa: str) -> ModuleType | str:
    """The module for `isa`, or the reason why it cannot run here."""
    if isa != "baseline":  # loading a module already runs its instructions
        baseline = _load("baseline")
        if isinstance(baseline, str):
            return baseline
        if not baseline.processor_can_run(isa):
            return f"this processor has no {isa.upper()}"
    return load(f"_cpu_{isa}", "a C++ compiler")


def signature() -> Callable[..., bytes | None] | None:
    """`signature(*tensors)` of csrc/common/tensors.cpp, or None without a compiled module."""
    return next((module.signature for module in modules().values()), None)


_forced_isa: str | None = None


@torch.compiler.assume_constant_result  # a compiled graph calls the kernels by name, not by this
def isa() -> str | None:
    """The instruction set in use, or None when there is no compiled module at all."""
    return _forced_isa or _default_isa()


@cache
def _default_isa() -> str | None:
    if config.CPU_ISA is None:
        return next(iter(modules()), None)
    _check_isa("LEEDL_FAST_CPU", config.CPU_ISA)
    return config.CPU_ISA


@contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Run the kernels of one instruction set, in the whole process: for tests and comparisons."""
    global _forced_isa
    _check_isa("isa", isa)
    before, _forced_isa = _forced_isa, isa
    vars(entry_points).clear()
    try:
        yield
    finally:
        _forced_isa = before
        vars(entry_points).clear()


def _check_isa(name: str, isa: str) -> None:
    if isa not in ISAS:
        raise ValueError(f"{name} must be one of {ISAS}, got {isa!r}")
    if isa not in modules():
        raise NotImplementedError(f"{name}={isa} cannot run here: {reasons()[isa]}")


class _EntryPoints:
    """The functions of the module in use, found at their first call."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(modules()[isa() or ""], name)
        setattr(self, name, function)
        return function


entry_points = _EntryPoints()
