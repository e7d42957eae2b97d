"""Which implementation runs an op: `select` walks an order per device and asks each for a reason
why it cannot.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from leedl_fast import config


class Implementation(NamedTuple):
    """One backend's kernels for one op.

    backend: the backend's name.
    unsupported: None if the kernels take this Problem, else the reason, written for people.
    kernels: by name; each is called `kernel(problem, *outputs, *inputs)` and fills the outputs.
    """

    backend: str
    unsupported: Callable[[Any], str | None]
    kernels: Mapping[str, Callable[..., None]]


EAGER = Implementation("eager", lambda problem: None, {})  # ops call leedl_fast.reference instead

# Per device type; every other device has only "eager".
_ORDER = {"cpu": ("cpu", "eager"), "cuda": ("triton", "cuda", "eager")}
_active: str | None = config.BACKEND  # a plain global: torch.compile guards on it, and recompiles


def names() -> tuple[str, ...]:
    """All backends that exist, whether or not they can run here."""
    return ("cpu", "triton", "cuda", "eager")


def table(backend: str) -> Mapping[str, Implementation]:
    """The ops that `backend` implements."""
    from leedl_fast.backends import cpu, cuda, triton

    tables = {"cpu": cpu.TABLE, "triton": triton.TABLE, "cuda": cuda.TABLE, "eager": _EAGER_TABLE}
    return tables[backend]


_EAGER_TABLE = dict.fromkeys(
    ("attention", "additive_attention", "add_layer_norm", "diffusion", "linear_cross_entropy"),
    EAGER,
)


def check_name(backend: str, name: str = "backend") -> None:
    if backend not in names():
        raise ValueError(f"{name} must be one of {names()}, got {backend!r}")


def requested(backend: str | None) -> str | None:
    """The backend that a call asks for: its own argument, else the one of `use_backend`."""
    return backend if backend is not None else _active


def select(op: str, problem: Any, backend: str | None = None) -> Implementation:
    """The implementation that runs `problem`.

    An explicit `backend` never falls back. Raises NotImplementedError with every backend's reason.
    """
    if backend is not None:
        check_name(backend)
    reasons = []
    for name in (backend,) if backend else _ORDER.get(problem.device.type, ("eager",)):
        implementation = table(name).get(op)
        reason = implementation.unsupported(problem) if implementation else "has no such op"
        if implementation and reason is None:
            return implementation
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"no backend can run {op}; " + "; ".join(reasons))


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Run every op called inside on `backend`, one of `names()`; None: each op picks.

    Like the `backend=` argument it never falls back: an op that the backend cannot run raises
    NotImplementedError. Holds for the whole process, threads included.
    """
    global _active
    if backend is not None:
        check_name(backend)
    before, _active = _active, backend
    try:
        yield
    finally:
        _active = before
