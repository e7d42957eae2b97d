"""GAN: a generator and a discriminator, both Transformers over the patches of small images.

Unconditional, or conditioned on a label or on a text. Papers: Goodfellow et al., "Generative
Adversarial Nets" (JS); Gulrajani et al., "Improved Training of Wasserstein GANs" (WGAN-GP); Mirza
and Osindero, "Conditional Generative Adversarial Nets"; Reed et al., "Generative Adversarial Text
to Image Synthesis" (mismatched pairs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.layers import SinusoidalPositionalEncoding
from leedl_fast.models.patches import PatchEmbedding, PatchHead, check_sizes, image_transformer

Latent = Literal["gaussian", "uniform", "binomial"]
Loss = Literal["js", "wgan-gp"]
ConditionKind = Literal["none", "label", "text"]


@dataclass(frozen=True)
class GANConfig:
    """Sizes and options of a GAN of images (1, image_size, image_size) in [-1, 1].

    image_size, num_labels, vocab_size, text_length: of the data; a vocab_size of 0 is no text.
    patch_size: images are cut into square patches, one token each.
    latent, latent_dim: distribution and number of the latent values; all have mean 0, variance 1.
    loss: "js", the classifier's loss of the first GAN, or "wgan-gp".
    condition: "none", "label" or "text".
    condition_dim: width of the condition. It is added to the latent when it equals latent_dim and
        concatenated otherwise.
    embed_dim, num_heads, num_layers: of the generator and of the discriminator.
    gradient_penalty: weight of the penalty of "wgan-gp".
    """

    image_size: int
    num_labels: int
    vocab_size: int
    text_length: int
    patch_size: int = 2
    latent: Latent = "gaussian"
    latent_dim: int = 32
    loss: Loss = "wgan-gp"
    condition: ConditionKind = "none"
    condition_dim: int = 32
    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 2
    gradient_penalty: float = 10.0

    def __post_init__(self) -> None:
        check_sizes(self.image_size, self.patch_size, self.embed_dim)
        for name, kind in (("latent", Latent), ("loss", Loss), ("condition", ConditionKind)):
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name in ("latent_dim", "condition_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        sizes = {"label": ("num_labels",), "text": ("vocab_size", "text_length")}
        for name in sizes.get(self.condition, ()):
            if getattr(self, name) < 1:
                raise ValueError(
                    f'{name} must be at least 1 for condition "{self.condition}", '
                    f"got {getattr(self, name)}"
                )
        if not self.gradient_penalty >= 0:
            raise ValueError(f"gradient_penalty must not be negative, got {self.gradient_penalty}")


class TextEncoder(nn.Module):
    """A Transformer that reads a text; the mean of its outputs is the condition.

    Shapes: tokens int64 (batch, seqlen), lengths int64 (batch,): how many of each row count;
    returns (batch, condition_dim).
    """

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position = SinusoidalPositionalEncoding(
            config.embed_dim, max_length=config.text_length
        )
        self.transformer = image_transformer(config.embed_dim, config.num_heads, 1)
        self.projection = nn.Linear(config.embed_dim, config.condition_dim)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.transformer(self.position(self.token_embedding(tokens)), key_lengths=lengths)
        counts = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        mean = (x * counts[..., None]).sum(dim=1) / lengths[:, None]
        return self.projection(mean)


class LabelEncoder(nn.Module):
    """A learned vector per label: int64 (batch,) -> (batch, condition_dim)."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_labels, config.condition_dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(labels)


Condition = tuple[Tensor, ...]  # (), (labels,) or (tokens, lengths): an encoder's arguments


def condition_encoder(config: GANConfig) -> nn.Module | None:
    if config.condition == "none":
        return None
    return LabelEncoder(config) if config.condition == "label" else TextEncoder(config)


class Generator(nn.Module):
    """From latents z (batch, latent_dim) and a condition to images (batch, 1, size, size) in
    (-1, 1): every patch begins as its position plus its own projection of the latent.
    """

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = condition_encoder(config)
        self.adds = config.condition_dim == config.latent_dim
        concatenates = self.encoder is not None and not self.adds
        input_dim = config.latent_dim + (config.condition_dim if concatenates else 0)
        self.num_patches = (config.image_size // config.patch_size) ** 2
        self.projection = nn.Linear(input_dim, self.num_patches * config.embed_dim)
        self.transformer = image_transformer(config.embed_dim, config.num_heads, config.num_layers)
        self.head = PatchHead(config.patch_size, config.embed_dim)

    def forward(self, z: Tensor, condition: Condition = ()) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.config.latent_dim:
            raise ValueError(
                f"z must have shape (batch, {self.config.latent_dim}), got {tuple(z.shape)}"
            )
        if self.encoder is not None:
            encoded = self.encoder(*condition)
            z = z + encoded if self.adds else torch.cat((z, encoded), dim=1)
        tokens = self.projection(z).unflatten(1, (self.num_patches, -1))
        return torch.tanh(self.head(self.transformer(tokens)))


class Discriminator(nn.Module):
    """A score (batch,) per image, or per pair of an image and its condition, high for real ones.

    The condition is one more token beside the patches.
    """

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.encoder = condition_encoder(config)
        self.embedding = PatchEmbedding(config.image_size, config.patch_size, config.embed_dim)
        if self.encoder is not None:
            self.condition_token = nn.Linear(config.condition_dim, config.embed_dim)
        self.transformer = image_transformer(config.embed_dim, config.num_heads, config.num_layers)
        num_tokens = (config.image_size // config.patch_size) ** 2 + (self.encoder is not None)
        self.score = nn.Linear(num_tokens * config.embed_dim, 1)

    def forward(self, images: Tensor, condition: Condition = ()) -> Tensor:
        tokens = self.embedding(images)
        if self.encoder is not None:
            token = self.condition_token(self.encoder(*condition))
            tokens = torch.cat((token[:, None], tokens), dim=1)
        return self.score(self.transformer(tokens).flatten(1))[:, 0]


class GAN(nn.Module):
    """A generator and a discriminator with their losses.

    `real` is a batch of images; its `condition` is that of each image, and `mismatched` is one
    that does not fit: a discriminator that saw only right pairs would never look at the condition.
    """

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = Generator(config)
        self.discriminator = Discriminator(config)

    def forward(self, z: Tensor, condition: Condition = ()) -> Tensor:
        return self.generator(z, condition)

    def discriminator_loss(
        self, real: Tensor, condition: Condition = (), mismatched: Condition = ()
    ) -> Tensor:
        """Real pairs high; generated images and mismatched pairs, half the weight each, low."""
        with torch.no_grad():
            fake = self.generator(self.latents(len(real)), condition)
        images, conditions = [real, fake], [condition, condition]
        if mismatched:
            images, conditions = [*images, real], [*conditions, mismatched]
        pairs = torch.cat(images), _concatenate(*conditions)
        real_scores, *low_scores = self.discriminator(*pairs).chunk(len(images))
        low = torch.stack([self._low(scores) for scores in low_scores]).mean()
        loss = self._low(-real_scores) + low
        if self.config.loss == "wgan-gp":
            share = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=torch.float32)
            between = torch.lerp(fake.to(real.dtype), real, share.to(real.dtype))
            penalty = gradient_penalty(self.discriminator, between, condition)
            loss = loss + self.config.gradient_penalty * penalty
        return loss

    def generator_loss(self, num_images: int, condition: Condition = ()) -> Tensor:
        """Generated images high: in "js" the form that does not saturate (Goodfellow et al.,
        section 3)."""
        fake = self.generator(self.latents(num_images), condition)
        return self._low(-self.discriminator(fake, condition))

    def latents(self, num_images: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents (num_images, latent_dim) of mean 0 and variance 1; drawn in float32, since torch
        draws other numbers in other dtypes.
        """
        weight = next(self.parameters())
        size = (num_images, self.config.latent_dim)
        draw = torch.randn if self.config.latent == "gaussian" else torch.rand
        z = draw(size, generator=generator, device=weight.device, dtype=torch.float32)
        if self.config.latent == "uniform":
            z = (2 * z - 1) * math.sqrt(3)
        elif self.config.latent == "binomial":  # one trial: -1 or 1
            z = (z < 0.5).float() * 2 - 1
        return z.to(weight.dtype)

    def _low(self, scores: Tensor) -> Tensor:
        """What makes `scores` fall; the negated scores make them rise."""
        return F.softplus(scores).mean() if self.config.loss == "js" else scores.mean()


def gradient_penalty(
    discriminator: Discriminator, images: Tensor, condition: Condition = ()
) -> Tensor:
    """`mean((|d score / d image| - 1)^2)`, itself differentiable: second derivatives of the layers.

    Gulrajani et al., equation 3.
    """
    images = images.detach().requires_grad_()
    scores = discriminator(images, condition)
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def _concatenate(*conditions: Condition) -> Condition:
    return tuple(torch.cat(parts) for parts in zip(*conditions, strict=True))
