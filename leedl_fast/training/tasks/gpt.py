"""GPT on the characters of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from leedl_fast.data.text import (
    CharacterVocabulary,
    digest,
    load_text,
    random_crops,
    split_tokens,
)
from leedl_fast.models.gpt import GPT, GPTConfig
from leedl_fast.training.settings import Settings
from leedl_fast.training.task import Goal, SampleOptions, Task, Variant

NUM_VALIDATION_BATCHES = 4
EVALUATION_BATCH_SIZE = 16


@dataclass(frozen=True)
class GPTSettings(Settings):
    steps: int = 800
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class GPTSampleOptions(SampleOptions):
    """See GPT.generate; tokens is how many characters to write.

    prompt: a text to go on from; None begins a line, or begins with the first of the model's
    characters where it knows no lines.
    """

    prompt: str | None = None
    tokens: int = 500
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class Text:
    """A text and what it is made of."""

    text: str
    vocabulary: CharacterVocabulary
    digest: str


class GPTTask(Task):
    """Next character; the last tenth of the text is held out."""

    name = "gpt"
    title = "GPT"
    shows = "next token until the end token; KV cache, temperature, top-k, top-p"
    Settings = GPTSettings
    ModelConfig = GPTConfig
    SampleOptions = GPTSampleOptions
    model_defaults: ClassVar[Mapping[str, Any]] = {
        "context_length": 128,
        "window": 64,
        "positions": "rotary",
    }
    data_text = "the Python documentation"
    own_data = "a text file in UTF-8"
    variants = (Variant(goals=(Goal("bits_per_character", 2.0, "at most"),)),)

    model: GPT

    @classmethod
    def load_data(cls, settings: GPTSettings) -> Text:
        text = load_text(settings.data)
        return Text(text, CharacterVocabulary.from_text(text), digest(text))

    @classmethod
    def describe(cls, data: Text) -> dict[str, Any]:
        return {"vocabulary": data.vocabulary.characters}

    def build_model(self) -> GPT:
        self.vocabulary = CharacterVocabulary(self.about["vocabulary"])
        return GPT(self.model_config(vocab_size=len(self.vocabulary)))

    def attach(self, data: Text) -> None:
        super().attach(data)
        context = self.model.config.context_length
        self.tokens = split_tokens(self.vocabulary.encode(data.text), context)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        return self._crops(self.tokens.train, index)

    def _crops(self, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
        return random_crops(
            tokens,
            context_length=self.model.config.context_length,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            step=index,
        )

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model.loss(*batch)

    def outputs(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model(batch[0])

    def validate(self) -> dict[str, float]:
        losses = [
            self.inference_model.loss(*(x.to(self.device) for x in crops)).item()
            for crops in (
                self._crops(self.tokens.validation, index)
                for index in range(NUM_VALIDATION_BATCHES)
            )
        ]
        return {"validation_loss": sum(losses) / len(losses)}

    def evaluate(self) -> dict[str, float]:
        """Each held-out character once, and with at least half a context before it, but for those
        of the text's beginning.
        """
        context, tokens = self.model.config.context_length, self.tokens.validation
        last = len(tokens) - 1 - context  # where the last crop begins
        begins = [*range(0, last, max(1, context // 2)), last]
        total = 0.0
        scored = 0  # targets so far: those of a crop that are later count
        for group in (
            begins[i : i + EVALUATION_BATCH_SIZE]
            for i in range(0, len(begins), EVALUATION_BATCH_SIZE)
        ):
            crops = torch.stack([tokens[begin : begin + context + 1] for begin in group])
            crops = crops.to(self.device)
            logits = self.inference_model(crops[:, :-1])
            losses = F.cross_entropy(logits.transpose(1, 2), crops[:, 1:], reduction="none")
            for begin, row in zip(group, losses, strict=True):
                total += row[scored - begin :].sum().item()
                scored = begin + context
        loss = total / scored
        return {"bits_per_character": loss / math.log(2), "validation_loss": loss}

    def sample(self, options: GPTSampleOptions, output: Path | None) -> Iterator[str]:
        """The prompt and the characters that follow it, one by one."""
        characters = self.vocabulary.characters
        begin = "\n" if "\n" in characters else characters[0]
        prompt = begin if options.prompt is None else options.prompt
        if not prompt:
            raise ValueError("prompt must have at least 1 character, got ''")
        if options.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {options.tokens}")
        tokens = self.inference_model.generate(
            self.vocabulary.encode(prompt)[None].to(self.device),
            options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=torch.Generator(self.device).manual_seed(options.seed),
        )
        for number, token in enumerate(tokens):
            if number == 0:  # by now the options are known to be good
                yield prompt
            yield self.vocabulary.decode(token.tolist())
