"""VQ-VAE: an autoencoder whose latents are entries of a learned codebook.

Paper: van den Oord et al., "Neural Discrete Representation Learning"; the moving averages of the
codebook are its appendix A.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.models.patches import PatchEmbedding, PatchHead, check_sizes, image_transformer

Codebook = Literal["ema", "loss"]


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes and options of a VQ-VAE of images (1, image_size, image_size) in [0, 1].

    patch_size: every patch of an image becomes one code.
    embed_dim, num_heads, num_layers: of the Transformers of encoder and decoder.
    num_codes, code_dim: size of the codebook.
    codebook: how its entries follow the latents: "ema", moving averages, or "loss", a gradient.
    decay: of the moving averages; also those of how often each code is used.
    commitment: weight of the term that keeps the encoder near its codes.
    """

    image_size: int
    patch_size: int = 4
    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 2
    num_codes: int = 64
    code_dim: int = 16
    codebook: Codebook = "ema"
    decay: float = 0.98
    commitment: float = 0.25

    def __post_init__(self) -> None:
        check_sizes(self.image_size, self.patch_size, self.embed_dim)
        for name in ("num_codes", "code_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.codebook not in get_args(Codebook):
            raise ValueError(f"codebook must be ema or loss, got {self.codebook!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if not self.commitment >= 0:
            raise ValueError(f"commitment must not be negative, got {self.commitment}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class VectorQuantizer(nn.Module):
    """Replaces each latent by the nearest entry of the codebook.

    Shapes: latents (batch, num_patches, code_dim); returns the entries, of the same shape and with
    the gradient of `latents` (straight through), their indices int64 (batch, num_patches), and the
    loss of codebook and commitment, equation 3 of the paper without its first term.

    While training it counts, in moving averages, how often each code is used at each position. A
    code that is hardly used any more moves to a latent of the batch. Processes that train together
    (torch.distributed, each with a batch of its own) count together, and keep one codebook.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        codes = torch.randn(config.num_codes, config.code_dim)
        self.codes = nn.Parameter(codes, requires_grad=config.codebook == "loss")
        self.register_buffer("counts", torch.ones(config.num_patches, config.num_codes))
        self.register_buffer("sums", codes * config.num_patches)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(latents.device.type, enabled=False):  # the averages need their digits
            return self._quantize(latents.to(self.codes.dtype))

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices = torch.cdist(latents.flatten(0, 1), self.codes).argmin(dim=1)
        if self.training:
            self._follow(latents.detach(), indices)
        quantized = self.codes[indices].view_as(latents)
        loss = self.config.commitment * F.mse_loss(latents, quantized.detach())
        if self.config.codebook == "loss":
            loss = loss + F.mse_loss(quantized, latents.detach())
        straight_through = latents + (quantized - latents).detach()
        return straight_through, indices.view(latents.shape[:2]), loss

    @torch.no_grad()
    def _follow(self, latents: Tensor, indices: Tensor) -> None:
        config = self.config
        flat = latents.flatten(0, 1)
        chosen = F.one_hot(indices, config.num_codes).to(flat.dtype)  # (batch * patches, codes)
        counts, sums = chosen.view(*latents.shape[:2], -1).sum(dim=0), chosen.T @ flat
        several = dist.is_available() and dist.is_initialized()
        if several:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        share = 1 - config.decay
        self.counts.lerp_(counts, share)
        self.sums.lerp_(sums, share)
        usage = self.counts.sum(dim=0)
        if config.codebook == "ema":
            self.codes.copy_(self.sums / usage[:, None].clamp_min(1e-5))
        unused = usage < 0.1 * usage.mean()
        if unused.any():
            drawn = flat[torch.randint(len(flat), (config.num_codes,), device=flat.device)]
            if several:
                dist.broadcast(drawn, src=0)
            self.codes[unused] = drawn[unused]
            self.counts[:, unused] = self.counts.mean(dim=1, keepdim=True)
            self.sums[unused] = self.codes[unused] * usage.mean()


class VQVAE(nn.Module):
    """Encoder, VectorQuantizer and decoder: one code per patch."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.embed_dim, config.num_heads, config.num_layers
        self.embedding = PatchEmbedding(config.image_size, config.patch_size, config.embed_dim)
        self.encoder = image_transformer(*sizes)
        self.to_code = nn.Linear(config.embed_dim, config.code_dim)
        self.quantizer = VectorQuantizer(config)
        self.from_code = nn.Linear(config.code_dim, config.embed_dim)
        self.position = nn.Parameter(0.02 * torch.randn(config.num_patches, config.embed_dim))
        self.decoder = image_transformer(*sizes)
        self.head = PatchHead(config.patch_size, config.embed_dim)

    def encode(self, images: Tensor) -> Tensor:
        """The codes of `images`, int64 (batch, num_patches)."""
        return self.quantizer(self._latents(images))[1]

    def decode(self, indices: Tensor) -> Tensor:
        """The images (batch, 1, size, size) of codes (batch, num_patches)."""
        return self._images(self.quantizer.codes[indices])

    def forward(self, images: Tensor) -> Tensor:
        """The reconstructions of `images`."""
        return self._images(self.quantizer(self._latents(images))[0])

    def loss(self, images: Tensor) -> Tensor:
        """Mean squared error per pixel, codebook and commitment: equation 3 of the paper."""
        quantized, _, loss = self.quantizer(self._latents(images))
        return F.mse_loss(self._images(quantized), images) + loss

    @torch.no_grad()
    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Images of codes drawn at each position as often as training used them there.

        Positions are drawn apart from each other: a picture that hangs together needs a prior that
        knows what stands beside what.
        """
        counts = self.quantizer.counts
        indices = torch.multinomial(counts, num_samples, replacement=True, generator=generator)
        return self.decode(indices.T).clamp(0, 1)

    def _latents(self, images: Tensor) -> Tensor:
        return self.to_code(self.encoder(self.embedding(images)))

    def _images(self, codes: Tensor) -> Tensor:
        return self.head(self.decoder(self.from_code(codes) + self.position))


def perplexity(indices: Tensor, num_codes: int) -> float:
    """exp of the entropy of how often each code occurs: the number of codes in effective use."""
    shares = torch.bincount(indices.flatten(), minlength=num_codes) / indices.numel()
    return torch.special.entr(shares).sum().exp().item()
