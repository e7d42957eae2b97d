"""Pairs of a text and its translation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leedl_fast.data.fetch import fetched_files
from leedl_fast.data.tables import read_table
from leedl_fast.data.text import digest

_CHINESE = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Translations:
    """sources[i] and targets[i] say the same."""

    sources: list[str]
    targets: list[str]
    digest: str


def load_translations(path: str | Path | None = None) -> Translations:
    """The data set "messages" (English to Chinese), or a CSV with the columns source and target.

    Of "messages" those that have a Chinese translation, each source once, sorted.
    """
    rows = _messages() if path is None else read_table(path, ("source", "target"))
    sources, targets = [row[0] for row in rows], [row[1] for row in rows]
    return Translations(sources, targets, digest("\n".join(sources), "\n".join(targets)))


def _messages() -> list[tuple[str, str]]:
    files = fetched_files("messages")
    pairs: dict[str, str] = {}
    for path in sorted(files):
        if path.endswith("/zh-Hans.json"):
            chinese = dict(_texts(_read(files[path])))
            for key, text in _texts(_read(files[path.replace("/zh-Hans.json", "/en.json")])):
                if _CHINESE.search(chinese.get(key, "")):
                    pairs.setdefault(text, chinese[key])
    return sorted(pairs.items())


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _texts(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _texts(value, f"{prefix}{key}/")
        elif isinstance(value, str):
            yield prefix + key, " ".join(value.split())
