"""Recordings as frames: who speaks in each of them, or in all of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from leedl_fast.data.audio import STEP_SECONDS, WINDOW_SECONDS, log_mel, read_wav
from leedl_fast.data.fetch import fetched_files
from leedl_fast.data.split import split_indices
from leedl_fast.data.text import digest, read_text
from leedl_fast.data.vowels import Utterances


@dataclass(frozen=True)
class Recordings:
    """frames[i] is (num_frames, num_mels) float32, labels[i] int64 (num_frames,), an index into
    label_names.
    """

    frames: list[Tensor]
    labels: list[Tensor]
    label_names: list[str]
    digest: str


def load_recordings(path: str | Path | None = None, *, num_mels: int = 40) -> Recordings:
    """The data set "call", or a folder of WAV files, each with an RTTM file of the same name.

    A frame's label is who speaks in its middle: nobody, one speaker, or several ("a+b").
    """
    if path is None:
        files = sorted(fetched_files("call").values())
    else:
        files = sorted(_folder(path).iterdir())
    sounds = [file for file in files if file.suffix.lower() == ".wav"]
    if not sounds:
        raise ValueError(f"data must be a folder with WAV files, got none in {str(path)!r}")
    frames, names = [], []
    for sound in sounds:
        frames.append(log_mel(*read_wav(sound), num_mels))
        names.append(_speakers(sound.with_suffix(".rttm"), len(frames[-1])))
    label_names = sorted({name for speakers in names for name in speakers})
    labels = [torch.tensor([label_names.index(name) for name in speakers]) for speakers in names]
    return Recordings(frames, labels, label_names, digest(*frames, *labels))


def load_spoken(path: str | Path, *, num_mels: int = 40) -> Utterances:
    """A folder whose subfolders are labels with WAV files in them; a tenth of them is held out."""
    sounds = sorted(file for file in _folder(path).glob("*/*") if file.suffix.lower() == ".wav")
    label_names = sorted({sound.parent.name for sound in sounds})
    if len(label_names) < 2:
        raise ValueError(
            f"data must be a folder with at least 2 subfolders of WAV files, got {label_names} "
            f"in {str(path)!r}"
        )
    train, held_out = split_indices(len(sounds))
    sounds = [sounds[i] for i in (*train.tolist(), *held_out.tolist())]
    frames = [log_mel(*read_wav(sound), num_mels) for sound in sounds]
    labels = torch.tensor([label_names.index(sound.parent.name) for sound in sounds])
    return Utterances(frames, labels, label_names, len(train), digest(labels, *frames))


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"data must be a folder, got {str(path)!r}, which is none")
    return path


def _speakers(path: Path, num_frames: int) -> list[str]:
    """Who speaks in the middle of each frame, by an RTTM file (SPEAKER file channel begin length
    <NA> <NA> name ...).
    """
    speaking: list[set[str]] = [set() for _ in range(num_frames)]
    for line in read_text(path, "WAV files with an RTTM file beside each").splitlines():
        fields = line.split()
        if not fields or fields[0] != "SPEAKER":
            continue
        try:
            begin, length, name = float(fields[3]), float(fields[4]), fields[7]
        except (IndexError, ValueError):
            raise ValueError(
                f"data must be RTTM lines SPEAKER file channel begin length <NA> <NA> name, "
                f"got {line!r} in {str(path)!r}"
            ) from None
        middle = WINDOW_SECONDS / 2
        first, end = (round((x - middle) / STEP_SECONDS) for x in (begin, begin + length))
        for frame in range(max(first, 0), min(end, num_frames)):
            speaking[frame].add(name)
    return ["+".join(sorted(names)) or "nobody" for names in speaking]
