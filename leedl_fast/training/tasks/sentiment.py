"""The text classifier on reviews: is a customer pleased?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from leedl_fast.data.pieces import NOTHING, PieceVocabulary, text_pieces
from leedl_fast.data.reviews import LabelledTexts, load_reviews
from leedl_fast.data.split import LengthBatches, split_indices, spread
from leedl_fast.models.text_classifier import TextClassifier, TextClassifierConfig
from leedl_fast.training.naive_bayes import naive_bayes_accuracy
from leedl_fast.training.settings import Settings
from leedl_fast.training.task import Goal, SampleOptions, Task, Variant

NUM_PIECES = 2  # of a character
NUM_VALIDATION_TEXTS = 500
EVALUATION_BATCH_SIZE = 64
NUM_EXAMPLES = 8  # held-out texts that a checkpoint keeps to show, of no more characters than
MAX_EXAMPLE_LENGTH = 60


GOALS = (Goal("accuracy", 0.80), Goal("gain", 0.0))


@dataclass(frozen=True)
class SentimentSettings(Settings):
    """min_count: characters and pairs of them seen fewer times in training are not known."""

    steps: int = 700
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    validate_every: int = 100
    min_count: int = 3


@dataclass(frozen=True)
class SentimentSampleOptions(SampleOptions):
    """prompt: a text to classify; None shows held-out ones."""

    prompt: str | None = None


@dataclass(frozen=True)
class Texts:
    """Texts with their labels, numbers of label_names, in training and held out."""

    train: list[tuple[str, int]]
    held_out: list[tuple[str, int]]
    label_names: list[str]
    vocabulary: PieceVocabulary
    digest: str


class SentimentTask(Task):
    """A tenth of the texts is held out; of a text the first max_length characters are read. A
    character's vector is the sum of its own and of that of the pair it makes with the next one.
    """

    name = "sentiment"
    title = "Text classifier"
    shows = "N to 1; attention pooling: a learned query that attends"
    Settings = SentimentSettings
    ModelConfig = TextClassifierConfig
    SampleOptions = SentimentSampleOptions
    model_defaults: ClassVar[Mapping[str, Any]] = {"num_layers": 1, "dropout": 0.3}
    data_sets = ("reviews",)
    data_text = "customers' reviews in Chinese, good and bad"
    own_data = "a CSV with the columns text and label"
    variants = (
        Variant(goals=GOALS),
        Variant("additive", {"score": "additive"}, GOALS),
        Variant("mean pooling", {"pooling": "mean", "num_layers": 0}),
    )

    model: TextClassifier
    settings: SentimentSettings

    @classmethod
    def load_data(cls, settings: SentimentSettings) -> Texts:
        data: LabelledTexts = load_reviews(settings.data)
        pairs = list(zip(data.texts, data.labels.tolist(), strict=True))
        train, held_out = (
            [pairs[i] for i in part.tolist()]
            for part in split_indices(len(pairs), seed=settings.seed)
        )
        return Texts(
            train,
            held_out,
            data.label_names,
            PieceVocabulary.from_tokens(
                (pieces for text, _ in train for pieces in text_pieces(text)),
                min_count=settings.min_count,
            ),
            data.digest,
        )

    @classmethod
    def describe(cls, data: Texts) -> dict[str, Any]:
        short = [pair for pair in data.held_out if len(pair[0]) <= MAX_EXAMPLE_LENGTH]
        return {
            "pieces": data.vocabulary.pieces,
            "label_names": data.label_names,
            "examples": [list(pair) for pair in spread(short, NUM_EXAMPLES)],
        }

    def build_model(self) -> TextClassifier:
        self.vocabulary = PieceVocabulary(self.about["pieces"])
        self.label_names: list[str] = self.about["label_names"]
        return TextClassifier(
            self.model_config(vocab_size=len(self.vocabulary), num_classes=len(self.label_names))
        )

    def attach(self, data: Texts) -> None:
        super().attach(data)
        self.train_rows = [(self._tokens(text), label) for text, label in data.train]
        self.held_out_rows = [(self._tokens(text), label) for text, label in data.held_out]
        settings = self.settings
        lengths = [len(tokens) for tokens, _ in self.train_rows]
        self.batches = LengthBatches(lengths, settings.batch_size, seed=settings.seed)

    def _tokens(self, text: str) -> Tensor:
        """int64 (seqlen, NUM_PIECES)."""
        pieces = text_pieces(text)[: self.model.config.max_length]
        return self.vocabulary.encode(pieces, NUM_PIECES)

    def batch(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """tokens, targets, lengths."""
        return _padded([self.train_rows[i] for i in self.batches[index]])

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.model.loss(*batch)

    def outputs(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        tokens, _, lengths = batch
        return self.model(tokens, lengths)

    def validate(self) -> dict[str, float]:
        return {"accuracy": self._accuracy(self.held_out_rows[:NUM_VALIDATION_TEXTS])}

    def evaluate(self) -> dict[str, float]:
        """accuracy: of the held-out texts; bayes_accuracy: of naive Bayes that sees which pieces a
        text has; gain: the difference.
        """
        accuracy, bayes = self._accuracy(self.held_out_rows), self._bayes_accuracy()
        return {"accuracy": accuracy, "bayes_accuracy": bayes, "gain": accuracy - bayes}

    def _accuracy(self, rows: Sequence[tuple[Tensor, int]]) -> float:
        right = 0
        rows = sorted(rows, key=lambda row: len(row[0]))
        for begin in range(0, len(rows), EVALUATION_BATCH_SIZE):
            batch = _padded(rows[begin : begin + EVALUATION_BATCH_SIZE])
            tokens, targets, lengths = (x.to(self.device) for x in batch)
            right += int((self.inference_model(tokens, lengths).argmax(dim=-1) == targets).sum())
        return right / len(rows)

    def _bayes_accuracy(self) -> float:
        def examples(pairs: Sequence[tuple[str, int]]) -> list[tuple[Tensor, int]]:
            encode = self.vocabulary.encode
            tokens = [(encode(text_pieces(text), NUM_PIECES), label) for text, label in pairs]
            return [(pieces[pieces != NOTHING].unique(), label) for pieces, label in tokens]

        return naive_bayes_accuracy(
            examples(self.data.train),
            examples(self.data.held_out),
            num_features=len(self.vocabulary),
            num_classes=len(self.label_names),
        )

    def sample(self, options: SentimentSampleOptions, output: Path | None) -> Iterator[str]:
        """Each text with the probability of each label, and the right one of a held-out text."""
        examples = self.about["examples"]
        if options.prompt is not None:
            examples = [(options.prompt, None)]
        for text, label in examples:
            if not text:
                raise ValueError("prompt must have at least 1 character, got ''")
            tokens = self._tokens(text)
            if label is None and not tokens.any():
                raise ValueError(f"prompt must have characters that training saw, got {text!r}")
            logits = self.inference_model(tokens[None].to(self.device))[0]
            shares = zip(self.label_names, logits.softmax(dim=-1).tolist(), strict=True)
            said = sorted(shares, key=lambda share: -share[1])
            yield f"{text}\n  -> {', '.join(f'{name} {share:.0%}' for name, share in said)}\n"
            if label is not None:
                yield f"  (reference: {self.label_names[label]})\n"


def _padded(rows: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, targets, lengths of rows of tokens and a target."""
    tokens = [row for row, _ in rows]
    return (
        pad_sequence(tokens, batch_first=True, padding_value=NOTHING),
        torch.tensor([label for _, label in rows]),
        torch.tensor([len(row) for row in tokens]),
    )
