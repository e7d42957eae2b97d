"""The models and their options, for people to read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from leedl_fast.training.registry import task_class
from leedl_fast.training.results import Record, all_results, reached_texts, rows
from leedl_fast.training.settings import settable_fields


def print_models(results: Path) -> None:
    """results: the folder with what the models reached."""
    machines = all_results(results)
    table = Table("model", "what it shows", "data", "must reach", "reached", "when, where")
    for row in rows():
        task, first = row.task, row.variant is row.task.variants[0]
        fetch = f" (fetch {', '.join(task.data_sets)})" if task.data_sets else ""
        there = [one for one in machines if row.key in one.records]
        table.add_row(
            row.key,
            f"{task.title}: {task.shows}" if first else "",
            task.data_text + fetch if first else "",
            "\n".join(map(str, row.variant.goals)),
            "\n".join("; ".join(reached_texts(row, one.records)) for one in there) or "not run",
            "\n".join(_when(one.records[row.key], one.machine) for one in there),
            end_section=row.variant is task.variants[-1],
        )
    Console().print(table)


def _when(record: Record, machine: dict[str, Any]) -> str:
    seconds = f", {record['seconds']:.0f} s" if "seconds" in record else ""
    return f"{record['date']}{seconds}, {machine['processor']}, {machine['cores']} cores"


def print_options(name: str) -> None:
    task = task_class(name)
    console = Console()
    console.print(f"{task.title}: {task.shows}", highlight=False)
    console.print(f"data: {task.data_text}; --data takes {task.own_data}", highlight=False)
    for variant in task.variants[1:]:
        changes = ", ".join(f"{key}={_text(value)}" for key, value in variant.changes.items())
        console.print(f"--variant {variant.name!r}: {changes}", highlight=False)
    defaults = task.default_options()
    table = Table("train --set", "type", "default")
    for config in (task.Settings, task.ModelConfig):
        for field in settable_fields(config).values():
            table.add_row(field.name, str(field.type), _text(defaults[field.name]))
    console.print(table)
    options = Table("sample --set", "type", "default")
    for field in dataclasses.fields(task.SampleOptions):
        options.add_row(field.name, str(field.type), _text(field.default))
    console.print(options)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
