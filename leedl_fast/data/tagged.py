"""Sentences whose words have parts of speech."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leedl_fast.data.fetch import fetched_files
from leedl_fast.data.text import digest, read_text


@dataclass(frozen=True)
class TaggedSentences:
    """words[i][j] has the tag tags[i][j]."""

    words: list[list[str]]
    tags: list[list[str]]
    digest: str


def load_tagged(path: str | Path | None = None) -> TaggedSentences:
    """The data set "pku", or the user's own file: a sentence per line, word/tag word/tag ..."""
    if path is None:
        (file,) = fetched_files("pku").values()
    else:
        file = Path(path)
    text = read_text(file, "a text file of lines word/tag word/tag")
    words, tags = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        pairs = [token.rpartition("/") for token in line.split()]
        if not pairs:
            continue
        for word, _, tag in pairs:
            if not word or not tag:
                raise ValueError(
                    f"data must be lines of word/tag, got {line[:40]!r} at line {number} "
                    f"of {str(file)!r}"
                )
        words.append([word for word, _, _ in pairs])
        tags.append([tag for _, _, tag in pairs])
    return TaggedSentences(words, tags, digest(text))
