"""Texts with one label each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from leedl_fast.data.fetch import fetched_files
from leedl_fast.data.tables import read_table
from leedl_fast.data.text import digest


@dataclass(frozen=True)
class LabelledTexts:
    """labels: int64 (len(texts),), an index into label_names."""

    texts: list[str]
    labels: Tensor
    label_names: list[str]
    digest: str


def load_reviews(path: str | Path | None = None) -> LabelledTexts:
    """The data set "reviews", each text once, or the user's own: a CSV of text and label."""
    if path is None:
        rows = [
            (text, file.stem)
            for file in fetched_files("reviews").values()
            for line in file.read_text(encoding="utf-8").splitlines()
            if (text := line.strip())
        ]
        # Copies would be trained on and held out at once.
        rows = sorted(set(rows))
    else:
        rows = [(text, label) for text, label in read_table(path, ("text", "label"))]
    names = sorted({label for _, label in rows})
    if len(names) < 2:
        raise ValueError(f"data must have at least 2 different labels, got {names}")
    return LabelledTexts(
        [text for text, _ in rows],
        torch.tensor([names.index(label) for _, label in rows]),
        names,
        digest("\n".join(f"{label}\t{text}" for text, label in rows)),
    )
