"""BERT on the characters of a text: blanks to fill, and which half of a passage comes first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from leedl_fast.data.text import CharacterVocabulary, digest, load_text
from leedl_fast.models.bert import BERTConfig, BERTForPretraining, mask_tokens
from leedl_fast.training.settings import Settings
from leedl_fast.training.task import Goal, SampleOptions, Task, Variant
from leedl_fast.training.tasks.gpt import Text

BLANK = "[MASK]"  # in a prompt
NUM_SPECIAL = 3  # [CLS], [SEP], [MASK]: the tokens after the characters
HELD_OUT = 0.1  # of the text, at its end
NUM_VALIDATION_PASSAGES = 64
NUM_EVALUATION_PASSAGES = 400
EVALUATION_BATCH_SIZE = 32
EVALUATION_SEED = 0  # the blanks are the same for every model

# Before a sentence: the end of another one, or an empty line.
_SENTENCE_END = re.compile(r"(?:[.!?:。！？]['\")]*\s*|\n\s*\n\s*)(?<=[\s。！？])(?=\S)")


def sentence_begins(text: str) -> list[int]:
    """The places where sentences begin, the text's own beginning first."""
    return [0, *(match.end() for match in _SENTENCE_END.finditer(text))]


@dataclass(frozen=True)
class BERTSettings(Settings):
    """mask_share: how many of the characters are chosen to be filled in."""

    steps: int = 900
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    mask_share: float = 0.15
    validate_every: int = 250


@dataclass(frozen=True)
class BERTSampleOptions(SampleOptions):
    """prompt: a text with some [MASK]; candidates: how many characters to name for each."""

    prompt: str = "The [MASK]bject is return[MASK]d by the f[MASK]nction."
    candidates: int = 3


class BERTTask(Task):
    """A passage begins with a sentence and is cut in the middle, wherever that is; half of the
    passages have their halves swapped. So order is learnt first from how sentences begin: halves of
    passages cut anywhere, where only the seam tells, are not learnt in such a short training.
    """

    name = "bert"
    title = "BERT"
    shows = "encoder only; masking 80/10/10, sentence order; heads for fine-tuning"
    Settings = BERTSettings
    ModelConfig = BERTConfig
    SampleOptions = BERTSampleOptions
    model_defaults: ClassVar[dict[str, Any]] = {
        "max_length": 131,
        "positions": "rotary",
        "norm_first": True,
        "eps": 1e-5,
    }
    data_text = "the Python documentation"
    own_data = "a text file in UTF-8"
    variants = (
        Variant(
            goals=(Goal("masked_accuracy", 0.45), Goal("order_accuracy", 0.85)),
        ),
    )

    model: BERTForPretraining
    settings: BERTSettings

    @classmethod
    def load_data(cls, settings: BERTSettings) -> Text:
        text = load_text(settings.data)
        return Text(text, CharacterVocabulary.from_text(text), digest(text))

    @classmethod
    def describe(cls, data: Text) -> dict[str, Any]:
        return {"vocabulary": data.vocabulary.characters}

    def build_model(self) -> BERTForPretraining:
        self.vocabulary = CharacterVocabulary(self.about["vocabulary"])
        self.cls_token, self.sep_token, self.mask_token = range(
            len(self.vocabulary), len(self.vocabulary) + NUM_SPECIAL
        )
        config = self.model_config(vocab_size=len(self.vocabulary) + NUM_SPECIAL)
        self.half_length = (config.max_length - NUM_SPECIAL) // 2
        if self.half_length < 1:
            raise ValueError(
                f"max_length must be at least {NUM_SPECIAL + 2}, got {config.max_length}"
            )
        return BERTForPretraining(config)

    def attach(self, data: Text) -> None:
        super().attach(data)
        self.tokens = self.vocabulary.encode(data.text)
        seqlen, border = 2 * self.half_length, int(len(data.text) * (1 - HELD_OUT))
        begins = sentence_begins(data.text)
        train = [begin for begin in begins if begin + seqlen <= border]
        held_out = [begin for begin in begins if border <= begin <= len(data.text) - seqlen]
        if not train or not held_out:
            raise ValueError(
                f"data must have sentences with {seqlen} characters from where they begin, in the "
                f"first nine tenths and in the last, got {len(train)} and {len(held_out)}"
            )
        self.train_begins, self.held_out_begins = torch.tensor(train), torch.tensor(held_out)

    def batch(self, index: int) -> tuple[Tensor, ...]:
        """tokens, targets, pair targets, segments."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
        chosen = torch.randint(len(self.train_begins), (settings.batch_size,), generator=generator)
        passages = self._passages(self.train_begins[chosen])
        swapped = torch.rand(len(passages), generator=generator) < 0.5
        tokens, segments = self._pairs(passages, swapped)
        tokens, targets = mask_tokens(
            tokens,
            mask_token=self.mask_token,
            replacements=(0, len(self.vocabulary)),
            maskable=tokens < len(self.vocabulary),
            share=settings.mask_share,
            generator=generator,
        )
        return tokens, targets, swapped.long(), segments

    def loss(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        masked_loss, order_loss = self.model.losses(*batch)
        return {
            "loss": masked_loss + order_loss,
            "masked_loss": masked_loss,
            "order_loss": order_loss,
        }

    def outputs(self, batch: tuple[Tensor, ...]) -> Tensor:
        tokens, _, _, segments = batch
        return self.model(tokens, segments)

    def validate(self) -> dict[str, float]:
        return self._evaluate(NUM_VALIDATION_PASSAGES)

    def evaluate(self) -> dict[str, float]:
        """masked_accuracy: of characters, all of them behind [MASK]; order_accuracy: of passages,
        each in both orders.
        """
        return self._evaluate(NUM_EVALUATION_PASSAGES)

    def _evaluate(self, limit: int) -> dict[str, float]:
        step = max(1, len(self.held_out_begins) // limit)
        passages = self._passages(self.held_out_begins[::step][:limit])
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        filled = blanks = ordered = 0
        for group in passages.split(EVALUATION_BATCH_SIZE):
            for swap in (False, True):
                swapped = torch.full((len(group),), swap)
                tokens, segments = (x.to(self.device) for x in self._pairs(group, swapped))
                chosen = torch.rand(tokens.shape, generator=generator) < self.settings.mask_share
                chosen = chosen.to(self.device) & (tokens < len(self.vocabulary))
                logits = self.inference_model(tokens.masked_fill(chosen, self.mask_token), segments)
                filled += int((logits.argmax(dim=-1) == tokens)[chosen].sum())
                blanks += int(chosen.sum())
                orders = self.inference_model.pair_logits(tokens, segments).argmax(dim=-1)
                ordered += int((orders == int(swap)).sum())
        return {
            "masked_accuracy": filled / max(1, blanks),
            "order_accuracy": ordered / (2 * len(passages)),
        }

    def _passages(self, begins: Tensor) -> Tensor:
        return self.tokens[begins[:, None] + torch.arange(2 * self.half_length)]

    def _pairs(self, passages: Tensor, swapped: Tensor) -> tuple[Tensor, Tensor]:
        """[CLS] half [SEP] half [SEP] of passages (batch, seqlen), and its segments."""
        first, second = passages.tensor_split(2, dim=1)
        swap = swapped[:, None]
        if first.shape == second.shape:
            first, second = torch.where(swap, second, first), torch.where(swap, first, second)

        def special(token: int) -> Tensor:
            return torch.full((len(passages), 1), token, device=passages.device)

        sep = special(self.sep_token)
        begin = torch.cat((special(self.cls_token), first, sep), dim=1)
        end = torch.cat((second, sep), dim=1)
        segments = torch.cat((torch.zeros_like(begin), torch.ones_like(end)), dim=1)
        return torch.cat((begin, end), dim=1), segments

    def sample(self, options: BERTSampleOptions, output: Path | None) -> Iterator[str]:
        """The prompt with its blanks filled, then the likeliest characters of each."""
        parts = options.prompt.split(BLANK)
        if len(parts) < 2:
            raise ValueError(f"prompt must have at least one {BLANK}, got {options.prompt!r}")
        if options.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {options.candidates}")
        tokens = self.vocabulary.encode(parts[0])
        for part in parts[1:]:
            blank = torch.tensor([self.mask_token])
            tokens = torch.cat((tokens, blank, self.vocabulary.encode(part)))
        if not 2 <= len(tokens) <= 2 * self.half_length:
            raise ValueError(
                f"prompt must have 2 to {2 * self.half_length} characters, got {len(tokens)}"
            )
        pairs, segments = self._pairs(tokens[None], torch.tensor([False]))
        logits = self.inference_model(pairs.to(self.device), segments.to(self.device))[0].cpu()
        probabilities = logits[:, : len(self.vocabulary)].softmax(dim=-1)
        is_blank = pairs[0] == self.mask_token
        filled = torch.where(is_blank, probabilities.argmax(dim=-1), pairs[0])
        yield self.vocabulary.decode(filled[filled < len(self.vocabulary)].tolist()) + "\n"
        for number, row in enumerate(probabilities[is_blank], start=1):
            likeliest = row.topk(min(options.candidates, len(row)))
            values = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            names = [f"{self.vocabulary.decode([i])!r} {share:.0%}" for i, share in values]
            yield f"blank {number}: {', '.join(names)}\n"
