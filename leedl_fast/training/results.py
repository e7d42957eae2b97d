"""What the rows of the table of models reached: a file per kind of machine, and README's table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leedl_fast.files import write_file
from leedl_fast.testing.bench import machine, machine_name
from leedl_fast.training.registry import TASKS, task_class
from leedl_fast.training.task import Goal, Task, Variant

SCHEMA = 1
PREFIX = "models-"  # of the files' names
BEGIN, END = "<!-- models -->", "<!-- /models -->"  # around README's table

Record = dict[str, Any]
"""A row's measurement: metrics, steps, seconds, processor_seconds, threads, torch, date; of a row
that failed: error, date.
"""


@dataclass(frozen=True)
class Row:
    """A row of the table of models: a task in one of its variants."""

    task: type[Task]
    variant: Variant

    @property
    def key(self) -> str:
        """Its name in files: "gan" or "gan/wgan-gp"."""
        return "/".join(filter(None, (self.task.name, self.variant.name)))

    @property
    def command(self) -> str:
        """What follows `leedl-fast train` to run it."""
        option = f" --variant {shlex.quote(self.variant.name)}" if self.variant.name else ""
        return self.task.name + option

    @property
    def compared(self) -> list[Row]:
        """The rows whose metrics this one's goals subtract."""
        names = {goal.minus.partition("/")[0] for goal in self.variant.goals if goal.minus}
        return [Row(self.task, variant) for variant in self.task.variants if variant.name in names]

    def outcomes(self, records: Mapping[str, Record]) -> list[Outcome]:
        """Each goal against the `records` of all rows by key."""
        metrics = records.get(self.key, {}).get("metrics", {})
        others = {
            f"{row.variant.name}/{metric}": value
            for row in self.compared
            for metric, value in records.get(row.key, {}).get("metrics", {}).items()
        }
        return [Outcome.of(goal, metrics, others) for goal in self.variant.goals]

    def measures(self) -> list[str]:
        """The metrics to show of a row without goals: those that its model's goals are about."""
        goals = (goal for variant in self.task.variants for goal in variant.goals)
        return list(dict.fromkeys(goal.metric for goal in goals))


@dataclass(frozen=True)
class Outcome:
    """value: None where a metric that the goal needs is not there, which `missing` names."""

    goal: Goal
    value: float | None
    missing: str = ""

    @classmethod
    def of(cls, goal: Goal, metrics: Mapping[str, float], others: Mapping[str, float]) -> Outcome:
        if goal.metric not in metrics:
            return cls(goal, None, goal.metric)
        if goal.minus and goal.minus not in others:
            return cls(goal, None, goal.minus)
        return cls(goal, goal.value(metrics, others))

    @property
    def reached(self) -> bool:
        return self.value is not None and self.goal.reached(self.value)


def rows(names: Iterable[str] = ()) -> list[Row]:
    """The rows `names`, each a row's key or a model's name for all of its rows; or every row."""
    chosen: dict[str, Row] = {}
    for name in tuple(names) or TASKS:
        model, _, variant = name.partition("/")
        task = task_class(model)
        variants = (task.variant(variant),) if variant else task.variants
        for row in (Row(task, variant) for variant in variants):
            chosen.setdefault(row.key, row)
    return list(chosen.values())


@dataclass
class Results:
    """The records of one kind of machine.

    machine: see leedl_fast.testing.bench.machine. records: by a row's key.
    """

    path: Path
    machine: dict[str, Any]
    records: dict[str, Record]

    @classmethod
    def of_this_machine(cls, folder: Path) -> Results:
        """What the file in `folder` holds, if there is one, and the machine as it is now."""
        facts = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        path = folder / f"{PREFIX}{machine_name(facts)}.json"
        records = cls.read(path).records if path.exists() else {}
        return cls(path, facts, records)

    @classmethod
    def read(cls, path: Path) -> Results:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"results must be a JSON file, got {str(path)!r}: {error}") from None
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"results must be a file of schema {SCHEMA}, got {schema} in {str(path)!r}"
            )
        return cls(path, content["machine"], content["rows"])

    def write(self) -> None:
        """With each row's goals as they are now; rows that no model has any more are left out."""
        kept = {
            row.key: self.records[row.key]
            | {
                "goals": [
                    {"goal": str(outcome.goal), "value": outcome.value, "reached": outcome.reached}
                    for outcome in row.outcomes(self.records)
                ]
            }
            for row in rows()
            if row.key in self.records
        }
        content = {"schema": SCHEMA, "machine": self.machine, "rows": kept}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_file(text.encode(), self.path)


def all_results(folder: Path) -> list[Results]:
    """Those of every kind of machine in `folder`."""
    return [Results.read(path) for path in sorted(folder.glob(f"{PREFIX}*.json"))]


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def reached_texts(row: Row, records: Mapping[str, Record]) -> list[str]:
    """What the row reached, a text per goal; without goals, a text per measure of its model."""
    record = records.get(row.key)
    if record is None:
        return ["not run"]
    if "error" in record:
        return [f"failed: {record['error']}"]
    if not row.variant.goals:
        metrics = record["metrics"]
        return [f"{name} {number(metrics[name])}" for name in row.measures() if name in metrics]
    return [
        f"{outcome.goal.metric} unknown without {outcome.missing}, missed"
        if outcome.value is None
        else number(outcome.value) + ("" if outcome.reached else ", missed")
        for outcome in row.outcomes(records)
    ]


def check_markers(text: str, path: Path) -> None:
    if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
        raise ValueError(
            f"readme must have a line {BEGIN} and after it a line {END}, once each, "
            f"got {text.count(BEGIN)} and {text.count(END)} in {str(path)!r}"
        )


def write_readme(path: Path, results: Results) -> None:
    """The table between the markers anew; the rest stays as it is."""
    text = path.read_text(encoding="utf-8")
    check_markers(text, path)
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_file(f"{before}{BEGIN}\n\n{markdown(results)}\n{END}{after}".encode(), path)


def markdown(results: Results) -> str:
    """A caption with the machine, then the table."""
    facts = results.machine
    lines = [
        f"`make models` on {facts['processor']} ({facts['cores']} cores, {facts['system']}); "
        "seconds are of training and evaluation, on the clock and of all threads together:",
        "",
        "| model | data | must reach | reached | s | processor s | threads | torch | date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        record = results.records.get(row.key, {})
        cells = [
            f"`{row.command}`",
            row.task.data_text,
            "; ".join(map(str, row.variant.goals)),
            "; ".join(reached_texts(row, results.records)),
            *(f"{record[name]:.0f}" if name in record else "" for name in TIMES),
            *(str(record.get(name, "")) for name in ("threads", "torch", "date")),
        ]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


TIMES = ("seconds", "processor_seconds")
