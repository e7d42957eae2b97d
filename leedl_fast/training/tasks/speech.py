"""Frames of speech, N to N: who speaks in each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from leedl_fast.data.audio import STEP_SECONDS, WINDOW_SECONDS
from leedl_fast.data.speech import Recordings, load_recordings, read_frames
from leedl_fast.models.speech import FrameClassifier, SpeechConfig
from leedl_fast.ops.linear_cross_entropy import IGNORED
from leedl_fast.training.frame_data import (
    EVALUATION_BATCH_SIZE,
    frame_statistics,
    padded,
    passage_begins,
)
from leedl_fast.training.settings import Settings
from leedl_fast.training.task import Goal, SampleOptions, Task, Variant

HELD_OUT = 0.3  # of every recording, at its end
MAX_EXAMPLE_FRAMES = 3000  # of the held-out part that a checkpoint keeps to show


@dataclass(frozen=True)
class SpeechSettings(Settings):
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 2e-3
    ema_decay: float = 0.98


@dataclass(frozen=True)
class SpeechSampleOptions(SampleOptions):
    """sound: a WAV file; None shows held-out frames of the training data, with the reference.
    shortest: seconds; a shorter segment is taken for a slip and joins the one before it.
    """

    sound: str | None = None
    shortest: float = 0.1

    def __post_init__(self) -> None:
        if not self.shortest >= 0:
            raise ValueError(f"shortest must not be negative, got {self.shortest}")


class SpeechTask(Task):
    """The last part of every recording is held out in one piece: neighbouring frames are almost
    equal, so held-out frames between frames to train on would tell nothing.
    """

    name = "speech"
    title = "speech frames"
    shows = "N to N on 25 ms frames every 10 ms; truncated self-attention"
    Settings = SpeechSettings
    ModelConfig = SpeechConfig
    SampleOptions = SpeechSampleOptions
    # Four layers of 15 frames see 0.6 s to each side; of two, how good they get hangs on the seed.
    model_defaults: ClassVar[Mapping[str, Any]] = {"window": 15, "num_layers": 4}
    data_sets = ("call",)
    data_text = "pyannote.audio's sample call, who speaks when"
    own_data = "a folder of WAV files of one sample rate, each with an RTTM file of the same name"
    variants = (
        Variant(
            goals=(
                Goal("frame_accuracy", 0.78),
                Goal("frame_accuracy", -0.02, minus="full attention/frame_accuracy"),
            )
        ),
        Variant("full attention", {"window": None}),
        Variant("no attention", {"window": 0}),
    )

    model: FrameClassifier
    settings: SpeechSettings

    @classmethod
    def load_data(cls, settings: SpeechSettings) -> Recordings:
        data = load_recordings(settings.data)
        train, held_out = split_recordings(data)
        classes = torch.cat([labels for _, labels in train]).unique().tolist() if train else []
        if len(classes) < 2 or not held_out:
            raise ValueError(
                f"data must have at least 2 different labels in the first {1 - HELD_OUT:.0%} of "
                f"its recordings, got {[data.label_names[label] for label in classes]}"
            )
        return data

    @classmethod
    def describe(cls, data: Recordings) -> dict[str, Any]:
        train, held_out = split_recordings(data)
        frames, labels = held_out[0]
        return {
            "label_names": data.label_names,
            "rate": data.rate,
            **frame_statistics([frames for frames, _ in train]),
            "example": frames[:MAX_EXAMPLE_FRAMES].clone(),
            "example_labels": labels[:MAX_EXAMPLE_FRAMES].clone(),
        }

    def build_model(self) -> FrameClassifier:
        mean, deviation = self.about["mean"], self.about["deviation"]
        config = self.model_config(
            num_features=len(mean), num_classes=len(self.about["label_names"])
        )
        return FrameClassifier(config, mean, deviation)

    def attach(self, data: Recordings) -> None:
        super().attach(data)
        self.train_parts, self.held_out_parts = split_recordings(data)
        length = self.model.config.max_length
        # Every passage that begins in a part and fills max_length is as likely as any other.
        self.num_begins = torch.tensor(
            [max(1, len(labels) - length + 1) for _, labels in self.train_parts]
        )

    def batch(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """frames, targets, lengths."""
        settings, length = self.settings, self.model.config.max_length
        generator = self.generator(index)
        ends = self.num_begins.cumsum(dim=0)
        places = torch.randint(int(ends[-1]), (settings.batch_size,), generator=generator)
        parts = torch.searchsorted(ends, places, right=True)
        begins = places - (ends - self.num_begins)[parts]
        passages = [
            tuple(x[begin : begin + length] for x in self.train_parts[part])
            for part, begin in zip(parts.tolist(), begins.tolist(), strict=True)
        ]
        frames, lengths = padded([frames for frames, _ in passages])
        targets = pad_sequence(
            [labels for _, labels in passages], batch_first=True, padding_value=IGNORED
        )
        return frames, targets, lengths

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.model.loss(*batch)

    def outputs(self, batch: tuple[Tensor, ...]) -> Tensor:
        frames, _, lengths = batch
        return self.model(frames, lengths)

    def evaluate(self) -> dict[str, float]:
        """frame_accuracy: of all held-out frames; majority_accuracy: that of the one label which is
        the most frequent among them.
        """
        right = 0
        for frames, labels in self.held_out_parts:
            right += int((self.predict(frames) == labels).sum())
        labels = torch.cat([labels for _, labels in self.held_out_parts])
        return {
            "frame_accuracy": right / len(labels),
            "majority_accuracy": int(labels.bincount().max()) / len(labels),
        }

    def predict(self, frames: Tensor) -> Tensor:
        """The likeliest label of each frame: (num_frames, num_features) -> int64 (num_frames,).

        Passages overlap by half, and a frame's label is from one where it is not at an edge.
        """
        length = self.model.config.max_length
        begins = passage_begins(len(frames), length, max(1, length // 2))
        passages = torch.stack([frames[begin : begin + length] for begin in begins])
        labels = torch.empty(len(frames), dtype=torch.int64)
        for first in range(0, len(begins), EVALUATION_BATCH_SIZE):
            group = slice(first, first + EVALUATION_BATCH_SIZE)
            found = self.inference_model(passages[group].to(self.device)).argmax(dim=-1).cpu()
            for begin, row in zip(begins[group], found, strict=True):
                edge = 0 if begin == 0 else length // 4
                labels[begin + edge : begin + length] = row[edge:]
        return labels

    def sample(self, options: SpeechSampleOptions, output: Path | None) -> Iterator[str]:
        """Segments: from when to when, in seconds, who."""
        if options.sound is not None:
            frames = read_frames(options.sound, self.about["rate"])
        else:
            frames = self.about["example"]
        yield from self._segments(self.predict(frames), options.shortest)
        if options.sound is None:
            yield "reference:\n"
            yield from self._segments(self.about["example_labels"], 0.0)

    def _segments(self, labels: Tensor, shortest: float) -> Iterator[str]:
        for first, end, label in segments(labels, round(shortest / STEP_SECONDS)):
            begin_time, end_time = (frame_time(frame) for frame in (first, end))
            yield f"{begin_time:7.2f} {end_time:7.2f} {self.about['label_names'][label]}\n"


def split_recordings(
    data: Recordings,
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """(frames, labels) of the parts to train on, and of those held out; none is empty."""
    train, held_out = [], []
    for frames, labels in zip(data.frames, data.labels, strict=True):
        border = int(len(labels) * (1 - HELD_OUT))
        train.append((frames[:border], labels[:border]))
        held_out.append((frames[border:], labels[border:]))
    return [part for part in train if len(part[1])], [part for part in held_out if len(part[1])]


def segments(labels: Tensor, shortest: int = 0) -> list[tuple[int, int, int]]:
    """(first frame, end, label) of each run of equal labels, int64 (num_frames,); runs of fewer
    than `shortest` frames join the one before them.
    """
    found: list[tuple[int, int, int]] = []
    end = 0
    for label, run in itertools.groupby(labels.tolist()):
        first, end = end, end + len(list(run))
        if found and (label == found[-1][2] or end - first < shortest):
            found[-1] = (found[-1][0], end, found[-1][2])
        else:
            found.append((first, end, label))
    return found


def frame_time(frame: int) -> float:
    """Seconds at which a frame begins to be nearer than the one before it; 0 for the first."""
    return frame * STEP_SECONDS + (WINDOW_SECONDS - STEP_SECONDS) / 2 if frame else 0.0
