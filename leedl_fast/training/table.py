"""Every row of the table of models, trained one after the other, each in a process of its own."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from leedl_fast.data.fetch import fetch
from leedl_fast.training.engine import train
from leedl_fast.training.registry import configure, task_class
from leedl_fast.training.results import (
    Record,
    Results,
    Row,
    check_markers,
    reached_texts,
    rows,
    write_readme,
)


def run_models(
    names: Iterable[str],
    folder: Path,
    readme: Path | None = None,
    *,
    measure: Callable[[Row], Record] | None = None,
    report: Callable[[str], None] = print,
) -> list[str]:
    """Train the rows `names` (see `rows`), or every row; returns what was missed.

    The rows that a goal compares with are trained before its own; those that were not asked for,
    only where they have not been measured. The results of this machine's file in `folder` and the
    table in `readme` are written after each row; all other rows stay as they were.

    Args:
        measure: trains one row; measure_row in a process of its own by default.
        report: takes lines on how it goes.

    Returns:
        A line for each goal that was missed and for each row that failed.
    """
    chosen = rows(names)
    if readme is not None:
        check_markers(readme.read_text(encoding="utf-8"), readme)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results.of_this_machine(folder)
    results.write()  # now: an hour of training later is too late to find out
    plan = in_order(chosen, results.records)
    for position, row in enumerate(plan, start=1):
        why = "" if row in chosen else ", which others are compared with"
        report(f"{position} of {len(plan)}: leedl-fast train {row.command}{why}")
        try:
            record = (measure or _measure_apart)(row)
        except Exception as error:  # whatever ended this row, the others are trained
            reason = " ".join(str(error).split())
            record = {"error": f"{type(error).__name__}: {reason}"}
        results.records[row.key] = record | {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
        results.write()
        if readme is not None:
            write_readme(readme, results)
        report("; ".join(reached_texts(row, results.records)))
    return [line for row in plan for line in missed(row, results.records)]


def in_order(chosen: Iterable[Row], records: Mapping[str, Record]) -> list[Row]:
    """The rows to train for `chosen`: first those that they are compared with, as far as these
    are chosen themselves or have no metrics in `records`.
    """
    chosen = list(chosen)
    plan: list[Row] = []

    def add(row: Row) -> None:
        for other in row.compared:
            if other in chosen or "metrics" not in records.get(other.key, {}):
                add(other)
        if row not in plan:
            plan.append(row)

    for row in chosen:
        add(row)
    return plan


def missed(row: Row, records: Mapping[str, Record]) -> list[str]:
    """A line for each goal that the row does not reach, or one that says why it failed."""
    if "error" in records[row.key]:
        return [f"{row.key}: {records[row.key]['error']}"]
    return [
        f"{row.key}: {outcome.goal}, got "
        f"{f'no {outcome.missing}' if outcome.value is None else f'{outcome.value:.4g}'}"
        for outcome in row.outcomes(records)
        if not outcome.reached
    ]


def measure_row(name: str, variant: str, changes: Mapping[str, Any]) -> Record:
    """Fetch what the row needs and train it, as `leedl-fast train --fetch` does."""
    for data_set in task_class(name).data_sets:
        fetch(data_set)
    start, start_processor = time.perf_counter(), time.process_time()
    result = train(configure(name, variant, **changes))
    seconds, processor_seconds = (
        time.perf_counter() - start,
        time.process_time() - start_processor,
    )
    if result.interrupted:  # training takes Ctrl-C for itself, to end after a whole step
        raise KeyboardInterrupt
    for metric, value in result.metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"the metric {metric} must be finite, got {value}")
    return {
        "metrics": result.metrics,
        "steps": result.steps_done,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor_seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _measure_apart(row: Row) -> Record:
    return apart(measure_row, row.task.name, row.variant.name, {})


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns or raises in a process of its own, which begins with nothing."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError("its process was killed or crashed") from None
