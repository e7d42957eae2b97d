"""Recordings as frames: who speaks in each of them, or in all of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from leedl_fast.data.audio import STEP_SECONDS, WINDOW_SECONDS, log_mel, read_wav
from leedl_fast.data.fetch import fetched_files
from leedl_fast.data.split import split_indices
from leedl_fast.data.text import digest, read_text
from leedl_fast.data.vowels import Utterances

NUM_MELS = 40


@dataclass(frozen=True)
class Recordings:
    """frames[i] is (num_frames, NUM_MELS) float32, labels[i] int64 (num_frames,), an index into
    label_names. rate: samples per second of all of them.
    """

    frames: list[Tensor]
    labels: list[Tensor]
    label_names: list[str]
    rate: int
    digest: str


def load_recordings(path: str | Path | None = None) -> Recordings:
    """The data set "call", or a folder of WAV files, each with an RTTM file of the same name.

    A frame's label is who speaks in its middle: nobody, one speaker, or several ("a+b").
    """
    if path is None:
        files = sorted(fetched_files("call").values())
    else:
        files = sorted(_folder(path).iterdir())
    sounds = [file for file in files if _is_sound(file)]
    if not sounds:
        raise ValueError(f"data must be a folder with WAV files, got none in {str(path)!r}")
    frames, rate = _read_all(sounds)
    names = [
        _speakers(sound.with_suffix(".rttm"), len(recording))
        for sound, recording in zip(sounds, frames, strict=True)
    ]
    label_names = sorted({name for speakers in names for name in speakers})
    if len(label_names) < 2:
        raise ValueError(
            f"data must have at least 2 different labels, got {label_names} in {str(path)!r}"
        )
    labels = [torch.tensor([label_names.index(name) for name in speakers]) for speakers in names]
    return Recordings(frames, labels, label_names, rate, digest(*frames, *labels))


def load_spoken(path: str | Path) -> Utterances:
    """A folder whose subfolders are labels with WAV files in them; a tenth of each is held out."""
    sounds: dict[str, list[Path]] = {}
    for file in sorted(_folder(path).glob("*/*")):
        if _is_sound(file):
            sounds.setdefault(file.parent.name, []).append(file)
    if len(sounds) < 2:
        raise ValueError(
            f"data must be a folder with at least 2 subfolders of WAV files, got {sorted(sounds)} "
            f"in {str(path)!r}"
        )
    train: list[tuple[Path, int]] = []
    held_out: list[tuple[Path, int]] = []
    for label, (name, files) in enumerate(sounds.items()):
        if len(files) < 2:
            raise ValueError(
                f"data must have at least 2 WAV files in every subfolder, got 1 in {name!r}"
            )
        for part, indices in zip((train, held_out), split_indices(len(files)), strict=True):
            part += [(files[i], label) for i in indices.tolist()]
    frames, rate = _read_all(file for file, _ in (*train, *held_out))
    labels = torch.tensor([label for _, label in (*train, *held_out)])
    return Utterances(frames, labels, list(sounds), len(train), digest(labels, *frames), rate)


def read_frames(path: str | Path, rate: int) -> Tensor:
    """The frames of one WAV file, (num_frames, NUM_MELS) float32, which must have `rate` samples
    per second.
    """
    samples, own_rate = read_wav(path)
    if own_rate != rate:
        # Other bands: mel filters reach up to half the rate.
        raise ValueError(
            f"sound must have {rate} samples per second, got {own_rate} in {str(path)!r}"
        )
    try:
        return log_mel(samples, rate, NUM_MELS)
    except ValueError as error:
        raise ValueError(f"{error} in {str(path)!r}") from None


def _read_all(sounds: Iterable[Path]) -> tuple[list[Tensor], int]:
    """The frames of each, and the samples per second that all have in common."""
    sounds = list(sounds)
    rate = read_wav(sounds[0])[1]
    return [read_frames(sound, rate) for sound in sounds], rate


def _is_sound(path: Path) -> bool:
    return path.suffix.lower() == ".wav"


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
