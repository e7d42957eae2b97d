"""Autoencoder, denoising autoencoder and variational autoencoder of small grey images.

Encoder and decoder are Transformers over patches, with one vector between them. Papers: Hinton and
Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks"; Vincent et al.,
"Extracting and Composing Robust Features with Denoising Autoencoders"; Kingma and Welling,
"Auto-Encoding Variational Bayes".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leedl_fast.models.patches import PatchEmbedding, PatchHead, check_sizes, image_transformer


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes and options of an autoencoder of images (1, image_size, image_size) in [0, 1].

    patch_size, embed_dim, num_heads, num_layers: of the Transformers of encoder and decoder.
    latent_dim: width of the vector between them.
    noise: standard deviation of the noise that is added to the encoder's input while training; more
        than 0 makes it a denoising autoencoder.
    output_std: VAE only: standard deviation of the decoder's normal distribution of a pixel.
    """

    image_size: int
    patch_size: int = 2
    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 1
    latent_dim: int = 8
    noise: float = 0.0
    output_std: float = 0.2

    def __post_init__(self) -> None:
        check_sizes(self.image_size, self.patch_size, self.embed_dim)
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")
        if not self.noise >= 0:
            raise ValueError(f"noise must not be negative, got {self.noise}")
        if not self.output_std > 0:
            raise ValueError(f"output_std must be positive, got {self.output_std}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Encoder(nn.Module):
    """Images (batch, 1, size, size) to vectors (batch, output_dim)."""

    def __init__(self, config: AutoencoderConfig, output_dim: int) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(config.image_size, config.patch_size, config.embed_dim)
        self.transformer = image_transformer(config.embed_dim, config.num_heads, config.num_layers)
        self.projection = nn.Linear(config.num_patches * config.embed_dim, output_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.transformer(self.embedding(images)).flatten(1))


class Decoder(nn.Module):
    """Vectors (batch, latent_dim) to images (batch, 1, size, size)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.num_patches = config.num_patches
        self.projection = nn.Linear(config.latent_dim, config.num_patches * config.embed_dim)
        self.transformer = image_transformer(config.embed_dim, config.num_heads, config.num_layers)
        self.head = PatchHead(config.patch_size, config.embed_dim)

    def forward(self, latents: Tensor) -> Tensor:
        tokens = self.projection(latents).unflatten(1, (self.num_patches, -1))
        return self.head(self.transformer(tokens))


class Autoencoder(nn.Module):
    """`decoder(encoder(images))`, trained to give the images back.

    The running mean and standard deviation of the latents say where to sample them.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, config.latent_dim)
        self.decoder = Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
        self.register_buffer("latent_std", torch.ones(config.latent_dim))

    def forward(self, images: Tensor) -> Tensor:
        """The reconstructions of `images`, both (batch, 1, size, size)."""
        return self.decoder(self.encoder(images))

    def loss(self, images: Tensor) -> Tensor:
        """Mean squared error per pixel; the clean images are the target of the noisy ones."""
        latents = self.encoder(self.add_noise(images))
        if self.training:
            with torch.no_grad():
                values = latents.to(self.latent_mean.dtype)  # under autocast they are bfloat16
                self.latent_mean.lerp_(values.mean(dim=0), 0.02)
                self.latent_std.lerp_(values.std(dim=0, correction=0), 0.02)
        return (self.decoder(latents) - images).square().mean()

    def add_noise(self, images: Tensor) -> Tensor:
        noise = self.config.noise
        return images if noise == 0 else images + noise * _normal_like(images)

    @torch.no_grad()
    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Images of latents drawn from a normal distribution with the training latents' moments."""
        device = self.latent_mean.device
        size = (num_samples, self.config.latent_dim)
        z = torch.randn(size, generator=generator, device=device)
        return self.decoder(self.latent_mean + self.latent_std * z).clamp(0, 1)

    @torch.no_grad()
    def anomaly_score(self, images: Tensor) -> Tensor:
        """Mean squared error of each reconstruction, (batch,): images unlike those of the training
        set are reconstructed badly."""
        return (self(images) - images).square().flatten(1).mean(dim=1)


class VAE(nn.Module):
    """Encoder to a normal distribution q(z | x), decoder from it, prior N(0, 1)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, 2 * config.latent_dim)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of q, both (batch, latent_dim)."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance

    def forward(self, images: Tensor) -> Tensor:
        """The reconstructions from the means."""
        return self.decoder(self.encode(images)[0])

    def loss(self, images: Tensor) -> Tensor:
        """The negative evidence lower bound in nats per image, less a constant.

        Reconstruction and KL divergence are both sums, over pixels and over latent dimensions: the
        mean of one beside the sum of the other weighs the divergence so much that q collapses to
        the prior. Kingma and Welling, equation 10.
        """
        mean, log_variance = self.encode(images)
        z = mean + (0.5 * log_variance).exp() * _normal_like(mean)
        error = (self.decoder(z) - images).square().flatten(1).sum(dim=1)
        return (error / (2 * self.config.output_std**2) + kl_divergence(mean, log_variance)).mean()

    @torch.no_grad()
    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Images of latents drawn from the prior."""
        device = next(self.parameters()).device
        size = (num_samples, self.config.latent_dim)
        z = torch.randn(size, generator=generator, device=device)
        return self.decoder(z).clamp(0, 1)

    @torch.no_grad()
    def num_active(self, images: Tensor, *, threshold: float = 0.01) -> int:
        """Latent dimensions whose mean varies over `images` with a variance above `threshold`.

        Burda et al., "Importance Weighted Autoencoders", section 5.2.
        """
        return int((self.encode(images)[0].var(dim=0) > threshold).sum())


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)), summed over the last dimension."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1)


def _normal_like(x: Tensor) -> Tensor:
    """Standard normal numbers of x's shape, drawn in float32 and then rounded: torch draws others
    in other dtypes, and a loss in bfloat16 would differ by more than rounding.
    """
    return torch.randn(x.shape, dtype=torch.float32, device=x.device).to(x.dtype)
