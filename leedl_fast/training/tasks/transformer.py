"""The Transformer on translation: a program's messages from English to Chinese."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from leedl_fast.data.split import LengthBatches, split_indices, spread
from leedl_fast.data.subwords import SubwordVocabulary
from leedl_fast.data.translations import load_translations
from leedl_fast.models.decoding import decode
from leedl_fast.models.transformer import BEGIN, END, PAD, Transformer, TransformerConfig
from leedl_fast.training.chrf import chrf
from leedl_fast.training.settings import Settings
from leedl_fast.training.task import Goal, SampleOptions, Task, Variant

NUM_SPECIAL = 3  # PAD, BEGIN, END
NUM_EVALUATION_PAIRS = 500
NUM_VALIDATION_PAIRS = 100
EVALUATION_BATCH_SIZE = 100
NUM_EXAMPLES = 8  # held-out pairs that a checkpoint keeps to show, with sources no longer than
MAX_EXAMPLE_LENGTH = 60  # characters


GOALS = (Goal("chrf_ratio", 10.0), Goal("loss_ratio", 2.0))


@dataclass(frozen=True)
class TransformerSettings(Settings):
    """vocabulary_size: tokens of the vocabulary that both languages share.

    label_smoothing, sampling_probability, guided_attention: see Transformer.loss.
    """

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    validate_every: int = 250
    vocabulary_size: int = 3000
    label_smoothing: float = 0.1
    sampling_probability: float = 0.0
    guided_attention: float = 0.0


@dataclass(frozen=True)
class TransformerSampleOptions(SampleOptions):
    """prompt: a text to translate; None shows held-out pairs. beam_size: see `decode`."""

    prompt: str | None = None
    beam_size: int = 4


@dataclass(frozen=True)
class Pairs:
    """Texts and their translations, in training and held out, and the tokens they are made of."""

    train: list[tuple[str, str]]
    held_out: list[tuple[str, str]]
    vocabulary: SubwordVocabulary
    digest: str


class TransformerTask(Task):
    """A tenth of the pairs is held out; pairs of more than max_length tokens are left out."""

    name = "transformer"
    title = "Transformer"
    shows = (
        "encoder, decoder, cross-attention; teacher forcing, scheduled sampling, label smoothing, "
        "beam search, copying, guided attention, non-autoregressive decoding"
    )
    Settings = TransformerSettings
    ModelConfig = TransformerConfig
    SampleOptions = TransformerSampleOptions
    model_defaults: ClassVar[dict[str, Any]] = {
        "max_length": 64,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
    }
    data_sets = ("messages",)
    data_text = "homeassistant's messages, English and Chinese"
    own_data = "a CSV with the columns source and target"
    variants = (
        Variant(goals=GOALS),
        Variant("copying", {"copying": True}, GOALS),
        # Less: no token knows what the others are, and the loss has the length's in it.
        Variant(
            "non-autoregressive",
            {"autoregressive": False},
            (Goal("chrf_ratio", 5.0), Goal("loss_ratio", 1.5)),
        ),
    )

    model: Transformer
    settings: TransformerSettings

    @classmethod
    def load_data(cls, settings: TransformerSettings) -> Pairs:
        data = load_translations(settings.data)
        pairs = list(zip(data.sources, data.targets, strict=True))
        train, held_out = split_indices(len(pairs), seed=settings.seed)
        train_pairs = [pairs[i] for i in train.tolist()]
        vocabulary = SubwordVocabulary.from_texts(
            (text for pair in train_pairs for text in pair),
            size=settings.vocabulary_size,
            num_special=NUM_SPECIAL,
        )
        return Pairs(train_pairs, [pairs[i] for i in held_out.tolist()], vocabulary, data.digest)

    @classmethod
    def describe(cls, data: Pairs) -> dict[str, Any]:
        short = [pair for pair in data.held_out if len(pair[0]) <= MAX_EXAMPLE_LENGTH]
        return {
            "characters": data.vocabulary.characters,
            "merges": [list(pair) for pair in data.vocabulary.merges],
            "examples": [list(pair) for pair in spread(short, NUM_EXAMPLES)],
        }

    def build_model(self) -> Transformer:
        self.vocabulary = SubwordVocabulary(
            self.about["characters"],
            [(left, right) for left, right in self.about["merges"]],
            num_special=NUM_SPECIAL,
        )
        size = len(self.vocabulary)
        return Transformer(self.model_config(source_vocab_size=size, target_vocab_size=size))

    def attach(self, data: Pairs) -> None:
        super().attach(data)
        self.train_tokens = self._encoded(data.train)[1]
        if not self.train_tokens:
            limit = self.model.config.max_length
            raise ValueError(f"data must have pairs of at most max_length = {limit} tokens")
        lengths = [sum(map(len, tokens)) for tokens in self.train_tokens]
        settings = self.settings
        self.batches = LengthBatches(lengths, settings.batch_size, seed=settings.seed)
        self.held_out, self.held_out_tokens = self._encoded(data.held_out)
        generator = torch.Generator().manual_seed(self.settings.seed)
        order = torch.randperm(len(self.held_out), generator=generator).tolist()
        self.held_out = [self.held_out[i] for i in order]
        self.held_out_tokens = [self.held_out_tokens[i] for i in order]

    def _encoded(
        self, pairs: Sequence[tuple[str, str]]
    ) -> tuple[list[tuple[str, str]], list[tuple[Tensor, Tensor]]]:
        """The pairs that are neither empty nor too long, and their tokens."""
        limit = self.model.config.max_length
        kept, tokens = [], []
        for source, target in pairs:
            source_tokens = self.vocabulary.encode(source)
            target_tokens = [*self.vocabulary.encode(target), END]
            if 1 <= len(source_tokens) <= limit and len(target_tokens) <= limit:
                kept.append((source, target))
                tokens.append((torch.tensor(source_tokens), torch.tensor(target_tokens)))
        return kept, tokens

    def batch(self, index: int) -> tuple[Tensor, ...]:
        """source, source_lengths, target, target_lengths."""
        return _padded([self.train_tokens[i] for i in self.batches[index]])

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        settings = self.settings
        return self.model.loss(
            *batch,
            label_smoothing=settings.label_smoothing,
            sampling_probability=settings.sampling_probability,
            guided_attention=settings.guided_attention,
        )

    def outputs(self, batch: tuple[Tensor, ...]) -> Tensor:
        source, source_lengths, target, _ = batch
        inputs = F.pad(target[:, :-1], (1, 0), value=BEGIN)
        return self.model(source, source_lengths, inputs)

    def validate(self) -> dict[str, float]:
        return self._evaluate(NUM_VALIDATION_PAIRS)

    def evaluate(self) -> dict[str, float]:
        """On held-out pairs: chrf of greedy translations, and of other pairs' references; the loss,
        and the loss with other pairs' sources. Both ratios are larger where the model reads.
        """
        return self._evaluate(NUM_EVALUATION_PAIRS)

    def _evaluate(self, limit: int) -> dict[str, float]:
        pairs, tokens = self.held_out[:limit], self.held_out_tokens[:limit]
        model = self.inference_model
        translations: list[str] = []
        right = wrong = num_targets = 0.0
        for begin in range(0, len(tokens), EVALUATION_BATCH_SIZE):
            group = _padded(tokens[begin : begin + EVALUATION_BATCH_SIZE])
            source, source_lengths, target, target_lengths = (x.to(self.device) for x in group)
            others = source.roll(1, 0), source_lengths.roll(1, 0)
            count = float(target_lengths.sum())
            right += count * model.loss(source, source_lengths, target, target_lengths).item()
            wrong += count * model.loss(*others, target, target_lengths).item()
            num_targets += count
            said = decode(model, source, source_lengths)
            translations += [self.vocabulary.decode(row) for row in said]
        references = [target for _, target in pairs]
        score = chrf(translations, references)
        shuffled = chrf(references[1:] + references[:1], references)
        return {
            "chrf": score,
            "shuffled_chrf": shuffled,
            "chrf_ratio": score / max(shuffled, 1e-9),
            "validation_loss": right / num_targets,
            "wrong_source_loss": wrong / num_targets,
            "loss_ratio": wrong / right,
        }

    def sample(self, options: TransformerSampleOptions, output: Path | None) -> Iterator[str]:
        """Each source with what the model makes of it, and the reference of a held-out one."""
        limit = self.model.config.max_length
        beam_size = options.beam_size if self.model.config.autoregressive else 1
        examples = self.about["examples"]
        if options.prompt is not None:
            examples = [(options.prompt, None)]
        for source, reference in examples:
            tokens = self.vocabulary.encode(source)
            if reference is not None and len(tokens) > limit:
                continue
            if not 1 <= len(tokens) <= limit:
                raise ValueError(f"prompt must have 1 to {limit} tokens, got {len(tokens)}")
            if reference is None and set(tokens) == {self.vocabulary.unknown}:
                raise ValueError(f"prompt must have characters that training saw, got {source!r}")
            inputs = (
                torch.tensor([tokens], device=self.device),
                torch.tensor([len(tokens)], device=self.device),
            )
            (said,) = decode(self.inference_model, *inputs, beam_size=beam_size)
            if options.attention_maps is not None and self.model.config.autoregressive:
                # Once more without a cache: the maps are of the whole translation.
                self.inference_model(*inputs, torch.tensor([[BEGIN, *said]], device=self.device))
            yield f"{source}\n  -> {self.vocabulary.decode(said)}\n"
            if reference is not None:
                yield f"  (reference: {reference})\n"


def _padded(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """source, source_lengths, target, target_lengths of pairs of token vectors."""
    padded: list[Tensor] = []
    for side in zip(*pairs, strict=True):
        padded.append(pad_sequence(list(side), batch_first=True, padding_value=PAD))
        padded.append(torch.tensor([len(tokens) for tokens in side]))
    return tuple(padded)
