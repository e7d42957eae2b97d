"""GAN on small images: conditioned on labels or texts, or on nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from leedl_fast.data.images import Images
from leedl_fast.data.text import CharacterVocabulary
from leedl_fast.models.gan import GAN, Condition, GANConfig
from leedl_fast.models.vqvae import perplexity
from leedl_fast.training.adversarial import AdversarialTask
from leedl_fast.training.image_data import (
    ImageSettings,
    describe_images,
    load_images,
    picture_path,
    split_images,
)
from leedl_fast.training.judge import NEIGHBOURS, precision, train_judge
from leedl_fast.training.pictures import write_grid
from leedl_fast.training.task import Goal, SampleOptions, Variant

NUM_EVALUATED = 1000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("{}", "a {}", "the picture of a {}")

Pairs = tuple[Tensor, Condition, Condition]  # images, their conditions, mismatched conditions


@dataclass(frozen=True)
class GANSettings(ImageSettings):
    """critic_steps: steps of the discriminator before each one of the generator."""

    steps: int = 1000
    learning_rate: float = 1e-3
    gradient_clip: float = 0.0
    weight_decay: float = 0.0
    ema_decay: float = 0.99
    critic_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic_steps < 1:
            raise ValueError(f"critic_steps must be at least 1, got {self.critic_steps}")


@dataclass(frozen=True)
class GANSampleOptions(SampleOptions):
    """prompt: what a model with texts draws; empty means every label. columns: images per row."""

    prompt: str = ""
    columns: int = 10


def captions_of(name: str) -> list[str]:
    """The texts that say that a picture shows `name`."""
    digit = name.isdecimal() and len(name) == 1
    forms = [name, DIGITS[int(name)]] if digit else [name]
    return [template.format(form) for form in forms for template in TEMPLATES]


class GANTask(AdversarialTask):
    """The discriminator sees real pairs, generated ones and mismatched ones.

    A judge trained on real images says which labels the generated ones have.
    """

    name = "gan"
    title = "GAN"
    shows = (
        "JS and WGAN-GP (second derivatives of the layers), three latents, conditions on labels and"
        " texts, mismatched pairs"
    )
    Settings = GANSettings
    ModelConfig = GANConfig
    SampleOptions = GANSampleOptions
    model_defaults: ClassVar[Mapping[str, Any]] = {
        "loss": "js",
        "condition": "label",
        "patch_size": 4,
    }
    data_text = "scikit-learn's digits"
    own_data = "a folder of images, with a subfolder per label"
    variants = (
        Variant(goals=(Goal("agreement", 0.95),)),
        Variant(
            "text",
            {"condition": "text", "condition_dim": 16, "latent": "uniform", "steps": 1200},
            (Goal("agreement", 0.95),),
        ),
        Variant(
            "wgan-gp",
            {"loss": "wgan-gp", "condition": "none", "critic_steps": 2},
            (Goal("effective_classes", 9.0), Goal("precision", 0.4)),
        ),
    )
    betas = (0.0, 0.9)  # those of the paper of WGAN-GP

    model: GAN
    settings: GANSettings

    @classmethod
    def load_data(cls, settings: GANSettings) -> Images:
        return load_images(settings)

    @classmethod
    def describe(cls, data: Images) -> dict[str, Any]:
        captions = [captions_of(name) for name in data.label_names]
        return describe_images(data) | {"captions": captions}

    def build_model(self) -> GAN:
        self.captions: list[list[str]] = self.about["captions"]
        flat = [caption for captions in self.captions for caption in captions]
        self.vocabulary = CharacterVocabulary.from_text("".join(flat)) if flat else None
        condition = self.run_config.model["condition"]
        if condition != "none" and not self.about["label_names"]:
            raise ValueError(
                f'data must have a subfolder of images per label for condition "{condition}", got '
                "images without labels; --set condition=none draws without"
            )
        return GAN(
            self.model_config(
                image_size=self.about["image_size"],
                num_labels=len(self.about["label_names"]),
                vocab_size=0 if self.vocabulary is None else len(self.vocabulary),
                text_length=max(map(len, flat), default=0),
            )
        )

    def attach(self, data: Images) -> None:
        super().attach(data)
        self.train_images, self.held_out = split_images(data, self.settings.seed)
        num_images = len(self.train_images.images)
        if num_images <= NEIGHBOURS:
            raise ValueError(
                f"data must have at least {NEIGHBOURS + 1} images to train on, got {num_images} "
                f"and {len(self.held_out.images)} held out"
            )

    def batch(self, index: int) -> list[Pairs]:
        """One triple for each step of the discriminator."""
        steps = self.settings.critic_steps
        return [self._pairs(index * steps + step) for step in range(steps)]

    def _pairs(self, index: int) -> Pairs:
        chosen = self.shuffled(len(self.train_images.images), index)
        images = 2 * self.train_images.images[chosen] - 1
        if self.train_images.labels is None or self.model.config.condition == "none":
            return images, (), ()
        labels = self.train_images.labels[chosen]
        generator = self.generator(index)
        num_labels = len(self.about["label_names"])
        shift = torch.randint(1, max(2, num_labels), labels.shape, generator=generator)
        others = (labels + shift) % num_labels
        return images, self._condition(labels, generator), self._condition(others, generator)

    def _condition(self, labels: Tensor, generator: torch.Generator) -> Condition:
        """The labels, or for each one of its captions."""
        if self.model.config.condition == "label":
            return (labels,)
        draws = torch.rand(len(labels), generator=generator).tolist()
        captions = [self.captions[label] for label in labels.tolist()]
        return self._texts(
            [choice[int(draw * len(choice))] for choice, draw in zip(captions, draws, strict=True)]
        )

    def _texts(self, texts: list[str]) -> Condition:
        """Tokens (batch, text_length), padded with zeros, and lengths (batch,)."""
        assert self.vocabulary is not None  # GANConfig refuses texts without a vocabulary
        length = self.model.config.text_length
        tokens = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            if not 1 <= len(text) <= length:
                raise ValueError(f"prompt must have 1 to {length} characters, got {text!r}")
            row[: len(text)] = self.vocabulary.encode(text)
        return tokens, torch.tensor([len(text) for text in texts])

    def loss(self, batch: list[Pairs]) -> dict[str, Tensor]:
        images, condition, mismatched = batch[-1]
        discriminator_loss = self.model.discriminator_loss(images, condition, mismatched)
        generator_loss = self.model.generator_loss(len(images), condition)
        return {"loss": discriminator_loss + generator_loss}

    def outputs(self, batch: list[Pairs]) -> Tensor:
        return self.model.discriminator(*batch[-1][:2])

    def training_step(self, batch: list[Pairs], batch_idx: int) -> dict[str, Tensor]:
        model = self.model
        for pairs in batch:
            discriminator_loss = self.step(
                "discriminator", functools.partial(model.discriminator_loss, *pairs)
            )
        images, condition, _ = batch[-1]
        generator_loss = self.step(
            "generator", lambda: model.generator_loss(len(images), condition)
        )
        return self.finish_step(discriminator_loss, generator_loss)

    def _generate(self, condition: Condition, number: int, generator: Any = None) -> Tensor:
        """Images in [0, 1]."""
        z = self.inference_model.latents(number, generator=generator)
        images = self.inference_model(z, tuple(part.to(self.device) for part in condition))
        return (images + 1) / 2

    def _generate_evaluated(self) -> tuple[Tensor, Tensor | None]:
        """NUM_EVALUATED images, and the labels asked for, as many of each."""
        if self.model.config.condition == "none":
            return self._generate((), NUM_EVALUATED), None
        labels = torch.arange(NUM_EVALUATED) % len(self.about["label_names"])
        condition = self._condition(labels, torch.Generator().manual_seed(self.settings.seed))
        return self._generate(condition, NUM_EVALUATED), labels.to(self.device)

    def validate(self) -> dict[str, float]:
        images, _ = self._generate_evaluated()
        return {"precision": precision(images, self.train_images.images.to(self.device))}

    def evaluate(self) -> dict[str, float]:
        """`precision` against `real_precision`, that of held-out images; with labels also what the
        judge says: `agreement` with those asked for, and `effective_classes`.
        """
        images, asked = self._generate_evaluated()
        train = self.train_images.images.to(self.device)
        held_out = self.held_out.images.to(self.device)
        metrics = {
            "precision": precision(images, train),
            "real_precision": precision(held_out, train),
        }
        if self.train_images.labels is None or self.held_out.labels is None:
            return metrics
        num_labels = len(self.about["label_names"])
        judge = train_judge(train, self.train_images.labels.to(self.device), num_labels)
        metrics["judge_accuracy"] = judge.accuracy(held_out, self.held_out.labels.to(self.device))
        metrics["effective_classes"] = perplexity(judge.labels(images), num_labels)
        if asked is not None:
            metrics["agreement"] = judge.accuracy(images, asked)
        return metrics

    def sample(self, options: GANSampleOptions, output: Path | None) -> Iterator[str]:
        """A grid: a row per label or caption, or of whatever comes."""
        path = picture_path(output, "gan.png")
        if options.columns < 1:
            raise ValueError(f"columns must be at least 1, got {options.columns}")
        kind = self.model.config.condition
        if options.prompt and kind != "text":
            raise ValueError(f'prompt needs a model with condition "text", got one with "{kind}"')
        generator = torch.Generator(self.device).manual_seed(options.seed)
        names = self.about["label_names"]
        rows = [options.prompt] if options.prompt else [captions[-1] for captions in self.captions]
        condition: Condition = ()
        if kind == "label":
            condition, rows = (torch.arange(len(names)),), names
        elif kind == "text":
            condition = self._texts(rows)
        else:
            rows = []
        num_rows = len(condition[0]) if condition else options.columns
        condition = tuple(part.repeat_interleave(options.columns, dim=0) for part in condition)
        images = self._generate(condition, num_rows * options.columns, generator)
        write_grid(images, path, columns=options.columns)
        what = f"a row of each of: {', '.join(rows)}" if rows else "whatever comes"
        yield f"wrote {path}: {what}\n"
