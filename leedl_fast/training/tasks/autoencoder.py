"""Autoencoder, VAE and VQ-VAE on small images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from leedl_fast.data.images import Images, load_image_folder
from leedl_fast.models.autoencoder import VAE, Autoencoder, AutoencoderConfig
from leedl_fast.models.patches import patchify
from leedl_fast.models.vqvae import VQVAE, VQVAEConfig, perplexity
from leedl_fast.training.image_data import (
    ImageSettings,
    describe_images,
    load_images,
    picture_path,
    split_images,
)
from leedl_fast.training.pictures import write_grid
from leedl_fast.training.task import Goal, SampleOptions, Task, Variant


@dataclass(frozen=True)
class AutoencoderSettings(ImageSettings):
    """normal_label: train on the images with this label alone; all others are then anomalies."""

    steps: int = 3000
    learning_rate: float = 3e-3
    normal_label: str | None = None


@dataclass(frozen=True)
class ReconstructionOptions(SampleOptions):
    """columns: images per row. images: a folder of images to reconstruct; None draws new ones."""

    columns: int = 10
    images: str | None = None

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError(f"columns must be at least 1, got {self.columns}")


class _ReconstructionTask(Task):
    """What all of them share: images in, the same images out."""

    Settings = ImageSettings
    SampleOptions = ReconstructionOptions
    data_text = "scikit-learn's digits"
    own_data = "a folder of images"

    model: Any
    settings: ImageSettings

    @classmethod
    def load_data(cls, settings: ImageSettings) -> Images:
        return load_images(settings)

    @classmethod
    def describe(cls, data: Images) -> dict[str, Any]:
        return describe_images(data)

    def attach(self, data: Images) -> None:
        super().attach(data)
        train, self.held_out = split_images(data, self.settings.seed)
        self.train_images = train.images

    def batch(self, index: int) -> Tensor:
        return self.train_images[self.shuffled(len(self.train_images), index)]

    def loss(self, batch: Tensor) -> Tensor:
        return self.model.loss(batch)

    def outputs(self, batch: Tensor) -> Tensor:
        return self.model(batch)

    def _mean_squared_error(self) -> float:
        images = self.held_out.images.to(self.device)
        return F.mse_loss(self.inference_model(images), images).item()

    def sample(self, options: ReconstructionOptions, output: Path | None) -> Iterator[str]:
        """New images from the decoder; or the images of a folder above their reconstructions."""
        path = picture_path(output, f"{self.name}.png")
        model = self.inference_model
        what = "new images"
        if options.images is None:
            generator = torch.Generator(self.device).manual_seed(options.seed)
            write_grid(
                model.sample(options.columns**2, generator=generator),
                path,
                columns=options.columns,
            )
        else:
            what = "rows of images, each above the row of their reconstructions"
            size = self.about["image_size"]
            images = load_image_folder(options.images, size=size, at_least=1).images
            images = images.to(self.device)
            reconstructions = model(images).clamp(0, 1)
            yield from self._scores(images)
            write_grid(
                _interleaved_rows(images, reconstructions, options.columns),
                path,
                columns=options.columns,
            )
        yield f"wrote {path}: {what}\n"

    def _scores(self, images: Tensor) -> Iterator[str]:
        return iter(())


def _interleaved_rows(first: Tensor, second: Tensor, columns: int) -> Tensor:
    """A row of `first`, then the same of `second`, and so on; the last row is filled with black."""
    missing = -len(first) % columns
    rows = [
        F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)).unflatten(0, (-1, columns))
        for images in (first, second)
    ]
    return torch.stack(rows, dim=1).flatten(0, 2)


class AutoencoderTask(_ReconstructionTask):
    """Compared with principal components of the same number; or as a denoiser, by the gain in
    signal to noise; or as a detector of anomalies, by the area under its ROC curve.
    """

    name = "autoencoder"
    title = "autoencoder"
    shows = "reconstruction, denoising, sampling from the decoder, anomaly score"
    Settings = AutoencoderSettings
    ModelConfig = AutoencoderConfig
    model_defaults: ClassVar[Mapping[str, Any]] = {"noise": 0.05}
    variants = (
        Variant(goals=(Goal("times_better_than_pca", 2.0),)),
        Variant(
            "denoising",
            {"noise": 0.3, "latent_dim": 32, "steps": 1500},
            (Goal("gain_db", 6.0),),
        ),
        Variant("anomaly", {"normal_label": "3", "steps": 400}, (Goal("auc", 0.9),)),
    )

    model: Autoencoder
    settings: AutoencoderSettings

    def build_model(self) -> Autoencoder:
        return Autoencoder(self.model_config(image_size=self.about["image_size"]))

    def attach(self, data: Images) -> None:
        super().attach(data)
        label = self.settings.normal_label
        if label is None:
            return
        train, _ = split_images(data, self.settings.seed)
        labels = self.held_out.labels
        if train.labels is None or labels is None or label not in data.label_names:
            raise ValueError(f"normal_label must be one of {data.label_names}, got {label!r}")
        normal = data.label_names.index(label)
        self.train_images = train.images[train.labels == normal]
        self.is_anomaly = labels != normal
        if not len(self.train_images) or self.is_anomaly.unique().numel() < 2:
            raise ValueError(
                f"data must have images of {label!r} to train on, and held out some of it and of "
                f"others, got {len(self.train_images)}, {int((labels == normal).sum())} and "
                f"{int(self.is_anomaly.sum())}"
            )

    def evaluate(self) -> dict[str, float]:
        error = self._mean_squared_error()
        images, train = (x.to(self.device) for x in (self.held_out.images, self.train_images))
        config = self.model.config
        if self.settings.normal_label is not None:
            scores = self.inference_model.anomaly_score(images)
            return {"auc": area_under_roc(scores, self.is_anomaly.to(self.device))}
        components = pca_error(train, images, config.latent_dim)
        metrics = {
            "mse": error,
            "pca_mse": components,
            "times_better_than_pca": components / error,
        }
        if config.noise > 0:
            noisy = images + config.noise * torch.randn_like(images)
            before = F.mse_loss(noisy, images).item()
            after = F.mse_loss(self.inference_model(noisy), images).item()
            metrics["gain_db"] = 10 * math.log10(before / after)
        return metrics

    def _scores(self, images: Tensor) -> Iterator[str]:
        for number, score in enumerate(self.inference_model.anomaly_score(images).tolist(), 1):
            yield f"image {number}: anomaly score {score:.5f}\n"


VAE_GOALS = (Goal("active_dims", 8), Goal("mse", 0.0125, "at most"))
VQVAE_GOALS = (Goal("times_better_than_kmeans", 1.2), Goal("perplexity", 32))


class VAETask(_ReconstructionTask):
    """How many latent dimensions carry something, and how well they reconstruct."""

    name = "vae"
    title = "VAE"
    shows = "variational bound (both of its terms are sums), sampling from the prior"
    ModelConfig = AutoencoderConfig
    model_defaults: ClassVar[Mapping[str, Any]] = {"latent_dim": 16}
    variants = (Variant("", {"steps": 1500, "learning_rate": 2e-3}, VAE_GOALS),)

    model: VAE

    def build_model(self) -> VAE:
        return VAE(self.model_config(image_size=self.about["image_size"]))

    def evaluate(self) -> dict[str, float]:
        images = self.held_out.images.to(self.device)
        return {
            "active_dims": self.inference_model.num_active(images),
            "mse": self._mean_squared_error(),
            "bound": self.inference_model.loss(images).item(),
        }


class VQVAETask(_ReconstructionTask):
    """Compared with k-means of single patches: a codebook of the same size, as many codes per
    image, so as many bits; codes that know of each other say more.
    """

    name = "vqvae"
    title = "VQ-VAE"
    shows = "straight-through gradient, commitment, codebook by moving averages or loss"
    ModelConfig = VQVAEConfig
    kept_whole = "whose codebook is written to while the model runs"
    variants = (
        Variant(
            "",
            {"steps": 2500, "learning_rate": 3e-3},
            VQVAE_GOALS,
        ),
        Variant(
            "codebook loss",
            {"steps": 2500, "learning_rate": 3e-3, "codebook": "loss"},
            VQVAE_GOALS,
        ),
    )

    model: VQVAE

    def build_model(self) -> VQVAE:
        return VQVAE(self.model_config(image_size=self.about["image_size"]))

    def validate(self) -> dict[str, float]:
        codes = self.inference_model.encode(self.held_out.images.to(self.device))
        return {
            "mse": self._mean_squared_error(),
            "perplexity": perplexity(codes, self.model.config.num_codes),
        }

    def evaluate(self) -> dict[str, float]:
        config, metrics = self.model.config, self.validate()
        train, images = (
            patchify(x, config.patch_size).flatten(0, 1).to(self.device)
            for x in (self.train_images, self.held_out.images)
        )
        clusters = kmeans_error(train, images, config.num_codes)
        metrics |= {"kmeans_mse": clusters, "times_better_than_kmeans": clusters / metrics["mse"]}
        return metrics


def pca_error(train: Tensor, images: Tensor, num_components: int) -> float:
    """Mean squared error of `images` in the principal components of `train`."""
    train, images = train.flatten(1), images.flatten(1)
    mean = train.mean(dim=0)
    components = torch.linalg.svd(train - mean, full_matrices=False).Vh[:num_components]
    return F.mse_loss((images - mean) @ components.T @ components + mean, images).item()


def kmeans_error(train: Tensor, vectors: Tensor, num_clusters: int, *, rounds: int = 30) -> float:
    """Mean squared error of `vectors` (n, dim) at the nearest of the centres of `train`.

    Lloyd's algorithm from k-means++'s centres; a cluster without members keeps its centre.
    """
    centres = train[torch.randint(len(train), (1,))]
    while len(centres) < num_clusters:
        distance = torch.cdist(train, centres).min(dim=1).values.square()
        centres = torch.cat((centres, train[torch.multinomial(distance + 1e-12, 1)]))
    for _ in range(rounds):
        members = F.one_hot(torch.cdist(train, centres).argmin(dim=1), num_clusters).to(train.dtype)
        sizes = members.sum(dim=0)[:, None]
        centres = torch.where(sizes > 0, members.T @ train / sizes.clamp_min(1), centres)
    return F.mse_loss(centres[torch.cdist(vectors, centres).argmin(dim=1)], vectors).item()


def area_under_roc(scores: Tensor, positive: Tensor) -> float:
    """The probability that a positive's score is above a negative's, ties counting half."""
    high, low = scores[positive][:, None], scores[~positive]
    return ((high > low).double() + 0.5 * (high == low)).mean().item()
