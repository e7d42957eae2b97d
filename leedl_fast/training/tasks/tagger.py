"""The sequence tagger on parts of speech: a tag for every word of a sentence."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from leedl_fast.data.pieces import NOTHING, PieceVocabulary, word_pieces
from leedl_fast.data.split import LengthBatches, spread
from leedl_fast.data.tables import read_numbers
from leedl_fast.data.tagged import load_tagged
from leedl_fast.models.tagger import Tagger, TaggerConfig
from leedl_fast.ops.linear_cross_entropy import IGNORED
from leedl_fast.training.settings import Settings
from leedl_fast.training.task import Goal, SampleOptions, Task, Variant

NUM_PIECES = 5  # of a word
HELD_OUT = 0.1  # of the sentences, the last ones
NUM_VALIDATION_ROWS = 200
EVALUATION_BATCH_SIZE = 64
NUM_EXAMPLES = 8  # held-out sentences that a checkpoint keeps to show, of no more words than
MAX_EXAMPLE_LENGTH = 20

_ABOVE_BASELINE = Goal("gain", 0.0)
_ABOVE_NO_ATTENTION = Goal("accuracy", 0.02, minus="without attention/accuracy")

Sentence = tuple[list[str], list[str]]  # words and their tags


@dataclass(frozen=True)
class TaggerSettings(Settings):
    """min_count: words seen fewer times in training are known by their characters alone.

    position_table: a file of numbers for positions="given", a line of embed_dim for each of the
    max_length positions; None gives the binary digits of the position.
    """

    steps: int = 900
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    validate_every: int = 250
    min_count: int = 3
    position_table: str | None = None


@dataclass(frozen=True)
class TaggerSampleOptions(SampleOptions):
    """prompt: words with spaces between them; None shows held-out sentences."""

    prompt: str | None = None


@dataclass(frozen=True)
class Sentences:
    """Words and their tags, in training and held out, and what they are made of."""

    train: list[Sentence]
    held_out: list[Sentence]
    vocabulary: PieceVocabulary
    tags: list[str]
    position_table: Tensor | None
    digest: str


def binary_digits(num_positions: int, num_digits: int) -> Tensor:
    """A table of positions given by hand: digit i of position p, as -1 or 1, in column i."""
    positions, digits = torch.arange(num_positions)[:, None], torch.arange(num_digits)
    return 2.0 * (positions >> digits.clamp(max=62) & 1) - 1


class TaggerTask(Task):
    """The last tenth of the sentences is held out: of a newspaper, other days than training's."""

    name = "tagger"
    title = "Sequence tagger"
    shows = (
        "N to N; embedding or one-hot input; rotary, sinusoidal, learned, given or no positions; "
        "dot and additive score; softmax, relu, sigmoid; window; no attention"
    )
    Settings = TaggerSettings
    ModelConfig = TaggerConfig
    SampleOptions = TaggerSampleOptions
    data_sets = ("pku",)
    data_text = "People's Daily of January 1998, words with parts of speech"
    own_data = "a text file of lines word/tag word/tag"
    variants = (
        Variant(
            goals=(Goal("accuracy", 0.901), _ABOVE_BASELINE, _ABOVE_NO_ATTENTION),
        ),
        Variant("without attention", {"attention": False}),
        Variant("window", {"window": 3}, (_ABOVE_NO_ATTENTION,)),
        Variant("relu", {"normalizer": "relu"}, (_ABOVE_NO_ATTENTION,)),
        Variant("sigmoid", {"normalizer": "sigmoid"}, (_ABOVE_BASELINE,)),
        Variant("additive", {"score": "additive"}, (_ABOVE_BASELINE,)),
        Variant("given positions", {"positions": "given"}, (_ABOVE_BASELINE,)),
    )

    model: Tagger
    settings: TaggerSettings

    @classmethod
    def load_data(cls, settings: TaggerSettings) -> Sentences:
        data = load_tagged(settings.data)
        sentences = list(zip(data.words, data.tags, strict=True))
        if len(sentences) < 2:
            raise ValueError(f"data must have at least 2 sentences, got {len(sentences)}")
        num_train = len(sentences) - max(1, round(len(sentences) * HELD_OUT))
        train = sentences[:num_train]
        table = settings.position_table
        return Sentences(
            train,
            sentences[num_train:],
            PieceVocabulary.from_tokens(
                (word_pieces(word) for words, _ in train for word in words),
                min_count=settings.min_count,
            ),
            sorted({tag for tags in data.tags for tag in tags}),
            None if table is None else read_numbers(table),
            data.digest,
        )

    @classmethod
    def describe(cls, data: Sentences) -> dict[str, Any]:
        short = [pair for pair in data.held_out if len(pair[0]) <= MAX_EXAMPLE_LENGTH]
        return {
            "pieces": data.vocabulary.pieces,
            "tags": data.tags,
            "position_table": data.position_table,
            "examples": [[*map(list, pair)] for pair in spread(short, NUM_EXAMPLES)],
        }

    def build_model(self) -> Tagger:
        self.vocabulary = PieceVocabulary(self.about["pieces"])
        self.tags: list[str] = self.about["tags"]
        config = self.model_config(vocab_size=len(self.vocabulary), num_tags=len(self.tags))
        table = self.about["position_table"]
        if table is None and config.positions == "given":
            table = binary_digits(config.max_length, config.embed_dim)
        return Tagger(config, table)

    def attach(self, data: Sentences) -> None:
        super().attach(data)
        self.train_rows = self._encoded(data.train)
        self.held_out_rows = self._encoded(data.held_out)
        settings = self.settings
        lengths = [len(targets) for _, targets in self.train_rows]
        self.batches = LengthBatches(lengths, settings.batch_size, seed=settings.seed)

    def _encoded(self, sentences: Sequence[Sentence]) -> list[tuple[Tensor, Tensor]]:
        """Tokens (seqlen, NUM_PIECES) and targets (seqlen,), cut where longer than max_length."""
        limit = self.model.config.max_length
        places = {
            word: i for i, word in enumerate({word: 0 for words, _ in sentences for word in words})
        }
        pieces = self._tokens(list(places))
        tags = {tag: i for i, tag in enumerate(self.tags)}
        rows: list[tuple[Tensor, Tensor]] = []
        for words, names in sentences:
            tokens = pieces[torch.tensor([places[word] for word in words])]
            targets = torch.tensor([tags[name] for name in names])
            rows += zip(tokens.split(limit), targets.split(limit), strict=True)
        return rows

    def _tokens(self, words: Sequence[str]) -> Tensor:
        return self.vocabulary.encode([word_pieces(word) for word in words], NUM_PIECES)

    def batch(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """tokens, targets, lengths."""
        return _padded([self.train_rows[i] for i in self.batches[index]])

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.model.loss(*batch)

    def outputs(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        tokens, targets, lengths = batch
        return self.model(tokens, lengths)[targets != IGNORED]

    def validate(self) -> dict[str, float]:
        rows = self.held_out_rows[:NUM_VALIDATION_ROWS]
        return {"accuracy": _share([right for row in self._right(rows) for right in row.tolist()])}

    def evaluate(self) -> dict[str, float]:
        """accuracy: of the held-out words; baseline_accuracy: of each word's most frequent tag in
        training, and of the most frequent tag of all for words that training did not see; gain:
        the difference; unseen_accuracy: of those words.
        """
        right = [right for row in self._right(self.held_out_rows) for right in row.tolist()]
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for words, tags in self.data.train:
            for word, tag in zip(words, tags, strict=True):
                counts[word][tag] += 1
        best = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
        ((common, _),) = sum(counts.values(), Counter()).most_common(1)
        pairs = [
            pair for words, tags in self.data.held_out for pair in zip(words, tags, strict=True)
        ]
        baseline = _share([best.get(word, common) == tag for word, tag in pairs])
        unseen = [
            is_right for is_right, (word, _) in zip(right, pairs, strict=True) if word not in best
        ]
        metrics = {"accuracy": _share(right), "baseline_accuracy": baseline}
        metrics["gain"] = metrics["accuracy"] - baseline
        return metrics | ({"unseen_accuracy": _share(unseen)} if unseen else {})

    def _right(self, rows: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Which tags the model gets right, bool (seqlen,) for each row."""
        right: list[Tensor] = [torch.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))
        for begin in range(0, len(rows), EVALUATION_BATCH_SIZE):
            group = order[begin : begin + EVALUATION_BATCH_SIZE]
            tokens, targets, lengths = (
                x.to(self.device) for x in _padded([rows[i] for i in group])
            )
            is_right = (self.inference_model(tokens, lengths).argmax(dim=-1) == targets).cpu()
            for i, row, length in zip(group, is_right, lengths.tolist(), strict=True):
                right[i] = row[:length]
        return right

    def sample(self, options: TaggerSampleOptions, output: Path | None) -> Iterator[str]:
        """Each sentence with the model's tags, and the reference of a held-out one."""
        limit = self.model.config.max_length
        examples = self.about["examples"]
        if options.prompt is not None:
            examples = [(options.prompt.split(), None)]
        for words, reference in examples:
            if not 1 <= len(words) <= limit:
                raise ValueError(f"prompt must have 1 to {limit} words, got {len(words)}")
            tokens = self._tokens(words)
            if reference is None and not tokens.any():
                raise ValueError(
                    f"prompt must have words or characters that training saw, got {words}"
                )
            logits = self.inference_model(tokens[None].to(self.device))
            tags = [self.tags[i] for i in logits[0].argmax(dim=-1).tolist()]
            yield " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True)) + "\n"
            if reference is not None:
                wrong = [
                    f"{word}/{tag}"
                    for word, tag, said in zip(words, reference, tags, strict=True)
                    if tag != said
                ]
                yield f"  (reference: {' '.join(wrong) or 'the same'})\n"


def _padded(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, targets, lengths of rows of tokens and targets."""
    tokens, targets = zip(*rows, strict=True)
    return (
        pad_sequence(list(tokens), batch_first=True, padding_value=NOTHING),
        pad_sequence(list(targets), batch_first=True, padding_value=IGNORED),
        torch.tensor([len(row) for row in targets]),
    )


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
