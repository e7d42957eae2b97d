"""Utterances, N to 1: who speaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leedl_fast.data.speech import load_spoken, read_frames
from leedl_fast.data.split import spread
from leedl_fast.data.vowels import Utterances, load_vowels
from leedl_fast.models.speech import SpeechConfig, UtteranceClassifier
from leedl_fast.training.frame_data import (
    EVALUATION_BATCH_SIZE,
    frame_statistics,
    padded,
    passage_begins,
)
from leedl_fast.training.settings import Settings
from leedl_fast.training.task import Goal, SampleOptions, Task, Variant

NUM_EXAMPLES = 9  # held-out utterances that a checkpoint keeps to show


@dataclass(frozen=True)
class SpeakersSettings(Settings):
    steps: int = 800
    batch_size: int = 32
    learning_rate: float = 2e-3
    ema_decay: float = 0.99


@dataclass(frozen=True)
class SpeakersSampleOptions(SampleOptions):
    """sound: a WAV file; None shows held-out utterances of the training data. candidates: how many
    speakers to name.
    """

    sound: str | None = None
    candidates: int = 2

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")


class SpeakersTask(Task):
    """An utterance of more than max_length frames is trained on in stretches, a new one each time,
    and judged by the mean of its passages' log-probabilities.
    """

    name = "speakers"
    title = "speakers"
    shows = "N to 1: attention pooling over utterances of different lengths"
    Settings = SpeakersSettings
    ModelConfig = SpeechConfig
    SampleOptions = SpeakersSampleOptions
    data_sets = ("vowels",)
    data_text = "aeon's JapaneseVowels, nine speakers"
    own_data = "a folder with a subfolder of WAV files for each speaker, all of one sample rate"
    variants = (
        Variant(goals=(Goal("accuracy", 0.97), Goal("gain_over_logistic_regression", 0.005))),
    )

    model: UtteranceClassifier
    settings: SpeakersSettings

    @classmethod
    def load_data(cls, settings: SpeakersSettings) -> Utterances:
        return load_vowels() if settings.data is None else load_spoken(settings.data)

    @classmethod
    def describe(cls, data: Utterances) -> dict[str, Any]:
        frames, labels = data.frames[data.num_train :], data.labels[data.num_train :].tolist()
        return {
            "label_names": data.label_names,
            "rate": data.rate,
            **frame_statistics(data.frames[: data.num_train]),
            "examples": [rows.clone() for rows in spread(frames, NUM_EXAMPLES)],
            "example_labels": spread(labels, NUM_EXAMPLES),
        }

    def build_model(self) -> UtteranceClassifier:
        mean, deviation = self.about["mean"], self.about["deviation"]
        config = self.model_config(
            num_features=len(mean), num_classes=len(self.about["label_names"])
        )
        return UtteranceClassifier(config, mean, deviation)

    def attach(self, data: Utterances) -> None:
        super().attach(data)
        size = data.num_train
        self.train_frames, self.train_labels = data.frames[:size], data.labels[:size]
        self.held_out_frames, self.held_out_labels = data.frames[size:], data.labels[size:]

    def batch(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """frames, targets, lengths."""
        length = self.model.config.max_length
        generator = self.generator(index)
        chosen = self.shuffled(len(self.train_frames), index)
        stretches = []
        for utterance in (self.train_frames[i] for i in chosen.tolist()):
            num_begins = max(1, len(utterance) - length + 1)
            begin = int(torch.randint(num_begins, (), generator=generator))
            stretches.append(utterance[begin : begin + length])
        frames, lengths = padded(stretches)
        return frames, self.train_labels[chosen], lengths

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.model.loss(*batch)

    def outputs(self, batch: tuple[Tensor, ...]) -> Tensor:
        frames, _, lengths = batch
        return self.model(frames, lengths)

    def validate(self) -> dict[str, float]:
        """accuracy: of held-out utterances."""
        found = torch.stack([self.log_probabilities(rows) for rows in self.held_out_frames])
        right = (found.argmax(dim=-1) == self.held_out_labels).float()
        return {"accuracy": right.mean().item()}

    def evaluate(self) -> dict[str, float]:
        """accuracy: of held-out utterances; logistic_regression_accuracy: with scikit-learn's
        defaults, on the mean of an utterance's standardised frames; and the difference of the two.
        """
        accuracy = self.validate()["accuracy"]
        linear = self._logistic_regression()
        return {
            "accuracy": accuracy,
            "logistic_regression_accuracy": linear,
            "gain_over_logistic_regression": accuracy - linear,
        }

    def _logistic_regression(self) -> float:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        train, held_out = (
            torch.stack([rows.mean(dim=0) for rows in frames]).numpy()
            for frames in (self.train_frames, self.held_out_frames)
        )
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(train, self.train_labels.numpy())
        return float(model.score(held_out, self.held_out_labels.numpy()))

    def log_probabilities(self, frames: Tensor) -> Tensor:
        """Of the speakers of one utterance: (num_frames, num_features) -> (num_classes,)."""
        length = self.model.config.max_length
        begins = passage_begins(len(frames), length, length)
        passages = torch.stack([frames[begin : begin + length] for begin in begins])
        logits = torch.cat(
            [
                self.inference_model(group.to(self.device)).float().cpu()
                for group in passages.split(EVALUATION_BATCH_SIZE)
            ]
        )
        return logits.log_softmax(dim=-1).mean(dim=0).log_softmax(dim=-1)

    def sample(self, options: SpeakersSampleOptions, output: Path | None) -> Iterator[str]:
        """The likeliest speakers of each utterance."""
        if options.sound is None:
            references = [f" (reference: {self._name(i)})" for i in self.about["example_labels"]]
            utterances = zip(self.about["examples"], references, strict=True)
        elif self.about["rate"] is None:
            raise ValueError(
                "sound must be None where training was not on WAV files, "
                f"got {options.sound!r}; train with --data"
            )
        else:
            utterances = zip([read_frames(options.sound, self.about["rate"])], [""], strict=True)
        for frames, reference in utterances:
            probabilities = self.log_probabilities(frames).exp()
            likeliest = probabilities.topk(min(options.candidates, len(probabilities)))
            values = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            names = ", ".join(f"{self._name(label)} {share:.0%}" for label, share in values)
            yield f"{len(frames)} frames: {names}{reference}\n"

    def _name(self, label: int) -> str:
        return self.about["label_names"][label]
