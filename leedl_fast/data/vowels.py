"""JapaneseVowels: who speaks an utterance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from leedl_fast.data.fetch import fetched_files
from leedl_fast.data.text import digest


@dataclass(frozen=True)
class Utterances:
    """Utterances of different lengths, each by one speaker.

    frames: each (num_frames, num_features) float32. labels: int64, an index into label_names.
    num_train: the first ones are for training, the others held out.
    rate: samples per second of the sound that frames were made of by log_mel; None for others.
    """

    frames: list[Tensor]
    labels: Tensor
    label_names: list[str]
    num_train: int
    digest: str
    rate: int | None = None


def load_vowels() -> Utterances:
    """The data set "vowels" with its own split: 270 utterances to train on and 370 others."""
    files = fetched_files("vowels")
    train, test = ([path for name, path in files.items() if part in name] for part in _PARTS)
    examples = [read_ts(path) for path in (*train, *test)]
    frames = [frame for example in examples for frame in example[0]]
    names = sorted({label for example in examples for label in example[1]})
    labels = torch.tensor([names.index(label) for example in examples for label in example[1]])
    return Utterances(frames, labels, names, len(examples[0][0]), digest(labels, *frames))


_PARTS = ("_TRAIN.ts", "_TEST.ts")


def read_ts(path: Path) -> tuple[list[Tensor], list[str]]:
    """A file of the time series format ts: (num_frames, num_features) and a label, per line.

    The header is lines of # and @ up to @data; a line of data is feature:feature:...:label, a
    feature is numbers between commas.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    begin = next((i for i, line in enumerate(lines) if line.strip().lower() == "@data"), None)
    if begin is None:
        raise ValueError(f"data must have a line @data, got none in {str(path)!r}")
    frames, labels = [], []
    for line in lines[begin + 1 :]:
        *features, label = line.strip().split(":")
        values = [[float(number) for number in feature.split(",")] for feature in features]
        frames.append(torch.tensor(values).T.contiguous())
        labels.append(label)
    return frames, labels
