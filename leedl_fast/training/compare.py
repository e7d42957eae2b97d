"""One model on two backends from one seed: do they agree, and what does a step cost?"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from leedl_fast.backends import use_backend
from leedl_fast.files import write_file
from leedl_fast.testing.bench import peak_memory
from leedl_fast.training.engine import make_task, train
from leedl_fast.training.pictures import write_curves
from leedl_fast.training.settings import RunConfig

EAGER = "eager"
# Of the largest value: what float32 sums in another order differ by after a few layers.
TOLERANCE = 1e-3
CURVE_TOLERANCE = 1e-2  # of the first loss: rounding grows from step to step


@dataclass(frozen=True)
class Side:
    """One backend's numbers. step_time in seconds, the median; memory in bytes, None where the
    system does not say.
    """

    outputs: Tensor
    gradients: dict[str, Tensor]
    losses: list[float]
    step_time: float
    memory: int | None


@dataclass(frozen=True)
class Comparison:
    """outputs, gradients: the largest difference in the first batch, over the largest value;
    infinite where a number is NaN or a parameter has a gradient on one side only.
    curve: the largest difference of losses, over the first loss.
    """

    run: RunConfig
    backend: str
    sides: dict[str, Side]
    outputs: float
    gradients: float
    curve: float

    @property
    def agrees(self) -> bool:
        return (
            self.outputs <= TOLERANCE
            and self.gradients <= TOLERANCE
            and self.curve <= CURVE_TOLERANCE
        )


def compare_backends(run: RunConfig, backend: str) -> Comparison:
    """Outputs and gradients of the first batch, then run.settings.steps steps of training."""
    if backend == EAGER:
        raise ValueError(
            f"backend must be another one than {EAGER}, which is what it stands beside"
        )
    sides = {name: _side(run, name) for name in (EAGER, backend)}
    eager, fast = sides[EAGER], sides[backend]
    curve = max(abs(a - b) for a, b in zip(eager.losses, fast.losses, strict=True))
    gradients = (
        max(_difference(eager.gradients[name], fast.gradients[name]) for name in eager.gradients)
        if eager.gradients.keys() == fast.gradients.keys()
        else math.inf
    )
    return Comparison(
        run,
        backend,
        sides,
        _difference(eager.outputs, fast.outputs),
        gradients,
        curve / max(abs(eager.losses[0]), 1e-12),
    )


def _difference(expected: Tensor, got: Tensor) -> float:
    largest = expected.abs().max().clamp(min=1e-6)  # a gradient of zero may differ by rounding
    difference = ((got - expected).abs().max() / largest).item()
    return math.inf if math.isnan(difference) else difference  # max(1.0, nan) is 1.0


def _side(run: RunConfig, backend: str) -> Side:
    with use_backend(backend):
        task = make_task(run)
        batch = task.batch(0)

        def forward(function: Any) -> Any:
            torch.manual_seed(run.settings.seed)  # the same dropout on both sides
            return function(batch)

        outputs = forward(task.outputs).detach()

        def step() -> None:
            forward(task.losses)["loss"].backward()

        step()
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in task.model.named_parameters()
            if parameter.grad is not None
        }
        # Freed within a step, they would hide as many bytes of it, or not: the allocator decides.
        task.zero_grad()
        memory = peak_memory(step)
        result = train(run, backend=backend, quiet=True)
    if result.interrupted:  # training takes Ctrl-C for itself, to end after a whole step
        raise KeyboardInterrupt
    return Side(outputs, gradients, result.losses, statistics.median(result.step_times), memory)


def write_numbers(comparison: Comparison, path: Path) -> None:
    """Every number of the comparison as JSON: times in seconds, memory in bytes; null for an
    infinite difference.
    """
    run = comparison.run
    content = {
        "model": run.task,
        "options": dataclasses.asdict(run.settings) | dict(run.model),
        "agrees": comparison.agrees,
        "differences": {
            name: {"got": got if math.isfinite(got) else None, "allowed": allowed}
            for name, got, allowed in (
                ("outputs", comparison.outputs, TOLERANCE),
                ("gradients", comparison.gradients, TOLERANCE),
                ("losses", comparison.curve, CURVE_TOLERANCE),
            )
        },
        "backends": {
            name: {"step_time": side.step_time, "memory": side.memory, "losses": side.losses}
            for name, side in comparison.sides.items()
        },
    }
    write_file((json.dumps(content, indent=1, allow_nan=False) + "\n").encode(), path)


def print_comparison(comparison: Comparison, plot: Path) -> None:
    """A table on the terminal and the loss curves as a picture."""
    sides = comparison.sides
    table = Table("", *sides, "difference", "allowed")
    first, last = ([f"{side.losses[index]:.5f}" for side in sides.values()] for index in (0, -1))
    table.add_row("outputs", "", "", f"{comparison.outputs:.1e}", f"{TOLERANCE:.0e}")
    table.add_row("gradients", "", "", f"{comparison.gradients:.1e}", f"{TOLERANCE:.0e}")
    table.add_row("first loss", *first, "", "")
    table.add_row("last loss", *last, f"{comparison.curve:.1e}", f"{CURVE_TOLERANCE:.0e}")
    times = [side.step_time for side in sides.values()]
    table.add_row("time per step", *(f"{time * 1e3:.1f} ms" for time in times), _ratio(*times), "")
    memory = [side.memory for side in sides.values()]
    known = [value for value in memory if value is not None]
    table.add_row(
        "memory per step",
        *("unknown" if value is None else f"{value / 1e6:.1f} MB" for value in memory),
        _ratio(*known) if len(known) == 2 else "",
        "",
    )
    Console().print(table)
    run = comparison.run
    write_curves(
        {name: side.losses for name, side in sides.items()},
        plot,
        f"{run.task}, seed {run.settings.seed}: eager and {comparison.backend}",
    )


def _ratio(eager: float, fast: float) -> str:
    return f"{eager / fast:.2f} times less" if fast > 0 else ""
