"""Rows of the user's CSV files, and tables of numbers."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import torch
from torch import Tensor

from leedl_fast.data.text import read_text


def read_table(path: str | Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The rows of a CSV file in UTF-8 whose first line names at least `columns`, in any order.

    Commas, semicolons or tabs separate, whichever the first line has; every field of `columns`
    must hold text.
    """
    text = read_text(path, f"a CSV file with the columns {', '.join(columns)}")
    first_line = text.partition("\n")[0]
    delimiter = max(",;\t", key=first_line.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    missing = set(columns) - set(rows.fieldnames or ())
    if missing:
        raise ValueError(
            f"data must have the columns {', '.join(columns)} in its first line, "
            f"got {first_line.strip()!r} in {str(path)!r}"
        )
    table = []
    for row in rows:
        values = tuple((row[column] or "").strip() for column in columns)
        if not all(values):
            raise ValueError(
                f"data must have text in the columns {', '.join(columns)} of every row, "
                f"got {values} at line {rows.line_num} of {str(path)!r}"
            )
        table.append(values)
    if len(table) < 2:
        raise ValueError(f"data must have at least 2 rows, got {len(table)} in {str(path)!r}")
    return table


def read_numbers(path: str | Path) -> Tensor:
    """A table of numbers in a text file, commas between them: float32 (lines, numbers a line)."""
    text = read_text(path, "a text file of numbers with commas between them")
    rows: list[list[float]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = [float(field) for field in line.split(",")]
        except ValueError:
            row = []
        if not row or not all(map(math.isfinite, row)) or (rows and len(row) != len(rows[0])):
            raise ValueError(
                "data must be lines of equally many finite numbers, "
                f"got {line[:40]!r} at line {number} of {str(path)!r}"
            )
        rows.append(row)
    return torch.tensor(rows)
