"""The models and their options, for people to read."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from leedl_fast.training.registry import TASKS, task_class
from leedl_fast.training.settings import settable_fields


def print_models() -> None:
    table = Table("model", "what it shows", "data", "must reach")
    for name in TASKS:
        task = task_class(name)
        goals = [
            f"{variant.name}: {goal}" if variant.name else str(goal)
            for variant in task.variants
            for goal in variant.goals
        ]
        fetch = f" (fetch {', '.join(task.data_sets)})" if task.data_sets else ""
        table.add_row(name, f"{task.title}: {task.shows}", task.data_text + fetch, "\n".join(goals))
    Console().print(table)


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
