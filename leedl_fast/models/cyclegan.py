"""CycleGAN: translation between two domains of images without pairs.

Two generators, x -> y and y -> x, whose composition must give the image back; one discriminator
per domain, or the first form of the tutorial with a discriminator of y alone. Paper: Zhu et al.,
"Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks"; the adversarial
loss is least squares, as in its section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.models.patches import PatchEmbedding, check_images, check_sizes, image_transformer


@dataclass(frozen=True)
class CycleGANConfig:
    """Sizes and options of a CycleGAN of images (1, image_size, image_size) in [-1, 1].

    patch_size: images are cut into square patches, one token each.
    embed_dim, num_heads, num_layers: of the Transformers of the discriminators.
    channels, num_blocks: width and residual blocks of the generators' convolutions.
    num_discriminators: 2, one per domain, or 1: of the second domain only.
    cycle_weight: of the mean absolute error after a whole cycle.
    """

    image_size: int
    patch_size: int = 4
    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 1
    channels: int = 16
    num_blocks: int = 1
    num_discriminators: int = 2
    cycle_weight: float = 10.0

    def __post_init__(self) -> None:
        check_sizes(self.image_size, self.patch_size, self.embed_dim)
        if self.num_discriminators not in (1, 2):
            raise ValueError(f"num_discriminators must be 1 or 2, got {self.num_discriminators}")
        for name in ("channels", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.cycle_weight >= 0:
            raise ValueError(f"cycle_weight must not be negative, got {self.cycle_weight}")


class ResidualBlock(nn.Module):
    """x plus two convolutions of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(x)))


class Generator(nn.Module):
    """Images of one domain to images of the other, both (batch, 1, size, size) in [-1, 1].

    Convolutions alone, as in the paper: every pixel is made from those near it, so that what the
    picture shows stays in its place. With the paper's ReLU, which has no gradient below 0, so
    few channels end in translations of one colour for some seeds; with GELU they do not.
    """

    def __init__(self, config: CycleGANConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(1, channels, 3, padding=1, padding_mode="reflect")
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(config.num_blocks)))
        self.conv_out = nn.Conv2d(channels, 1, 3, padding=1, padding_mode="reflect")

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        return torch.tanh(self.conv_out(F.gelu(self.blocks(F.gelu(self.conv_in(images))))))


class Discriminator(nn.Module):
    """A score per patch, (batch, num_patches), 1 for real images and 0 for translated ones."""

    def __init__(self, config: CycleGANConfig) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(config.image_size, config.patch_size, config.embed_dim)
        self.transformer = image_transformer(config.embed_dim, config.num_heads, config.num_layers)
        self.score = nn.Linear(config.embed_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.transformer(self.embedding(images)))[:, :, 0]


class CycleGAN(nn.Module):
    """Generators and discriminators with their losses; x and y are batches of the two domains."""

    def __init__(self, config: CycleGANConfig) -> None:
        super().__init__()
        self.config = config
        self.generator_xy = Generator(config)
        self.generator_yx = Generator(config)
        self.discriminator_y = Discriminator(config)
        self.discriminator_x = Discriminator(config) if config.num_discriminators == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """The translations of `x` into the second domain."""
        return self.generator_xy(x)

    def generator_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial losses of the translations plus cycle_weight times the cycle losses.

        With one discriminator only the cycle x -> y -> x is trained.
        """
        fake_y = self.generator_xy(x)
        adversarial = (self.discriminator_y(fake_y) - 1).square().mean()
        cycle = (self.generator_yx(fake_y) - x).abs().mean()
        if self.discriminator_x is not None:
            fake_x = self.generator_yx(y)
            adversarial = adversarial + (self.discriminator_x(fake_x) - 1).square().mean()
            cycle = cycle + (self.generator_xy(fake_x) - y).abs().mean()
        return adversarial + self.config.cycle_weight * cycle

    def discriminator_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Least squares: real images to 1, translated ones, detached from the generators, to 0."""
        with torch.no_grad():
            fake_y = self.generator_xy(x)
        loss = _least_squares(self.discriminator_y, y, fake_y)
        if self.discriminator_x is not None:
            with torch.no_grad():
                fake_x = self.generator_yx(y)
            loss = loss + _least_squares(self.discriminator_x, x, fake_x)
        return loss


def _least_squares(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    real_scores, fake_scores = discriminator(torch.cat((real, fake))).chunk(2)
    return 0.5 * ((real_scores - 1).square().mean() + fake_scores.square().mean())
