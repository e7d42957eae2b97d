"""The models and their options, for people to read."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from leedl_fast.training.registry import TASKS, task_class
from leedl_fast.training.results import Record, Results, Row, all_results, reached_texts, rows
from leedl_fast.training.settings import settable_fields


def print_models(results: Path) -> None:
    """A heading for each model, then its rows: a line per goal, and again for each machine.

    results: the folder with what the models reached.
    """
    machines = all_results(results)
    console = Console()
    for name in TASKS:
        task = task_class(name)
        fetch = f" (fetch {', '.join(task.data_sets)})" if task.data_sets else ""
        console.print(f"{task.title}: {task.shows}", style="bold", highlight=False)
        console.print(f"on {task.data_text}{fetch}", highlight=False)
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("model", no_wrap=True)
        table.add_column("must reach", overflow="fold")
        table.add_column("reached", overflow="fold")
        table.add_column("when, where", overflow="fold")
        for row in rows([name]):
            for cells in _lines(row, machines):
                table.add_row(*cells)
        console.print(table)
        console.print()


def _lines(row: Row, machines: list[Results]) -> Iterator[tuple[str, str, str, str]]:
    there = [one for one in machines if row.key in one.records]
    blocks = [
        (reached_texts(row, one.records), _when(one.records[row.key], one.machine)) for one in there
    ]
    goals = [str(goal) for goal in row.variant.goals]
    key = row.key
    for texts, when in blocks or [(["not run"], "")]:
        for goal, text in itertools.zip_longest(goals, texts, fillvalue=""):
            yield key, goal, text, when
            key = when = ""


def _when(record: Record, machine: dict[str, Any]) -> str:
    seconds = f", {record['seconds']:.0f} s" if "seconds" in record else ""
    return f"{record['date']}{seconds}, {machine['processor']}, {machine['cores']} cores"


def print_options(model: str) -> None:
    task = task_class(model)
    console = Console()
    console.print(f"{task.title}: {task.shows}", highlight=False)
    console.print(f"data: {task.data_text}; --data takes {task.own_data}", highlight=False)
    for variant in task.variants[1:]:
        changes = ", ".join(f"{key}={_text(value)}" for key, value in variant.changes.items())
        console.print(f"--variant {variant.name!r}: {changes}", highlight=False)
    defaults = task.default_options()
    table = Table("train --set", "type", "default")
    for config in (task.Settings, task.ModelConfig):
        for name, kind in _types(config).items():
            table.add_row(name, kind, _text(defaults[name]))
    console.print(table)
    options = Table("sample --set", "type", "default")
    kinds = _types(task.SampleOptions)
    for field in dataclasses.fields(task.SampleOptions):
        options.add_row(field.name, kinds[field.name], _text(field.default))
    console.print(options)


def _types(config: type) -> dict[str, str]:
    """What each field that may be set takes: a type, or the values that it may have."""
    hints = typing.get_type_hints(config)
    choices = {
        name: ", ".join(map(str, typing.get_args(hint)))
        for name, hint in hints.items()
        if typing.get_origin(hint) is Literal
    }
    fields = settable_fields(config)
    return {name: choices.get(name, str(field.type)) for name, field in fields.items()}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
