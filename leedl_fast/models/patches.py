"""Images as sequences of tokens: one token per square patch, row by row.

Paper: Dosovitskiy et al., "An Image is Worth 16x16 Words", section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leedl_fast.layers import AddLayerNorm, TransformerEncoder, TransformerEncoderLayer


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(batch, 1, height, width) -> (batch, num_patches, patch_size**2)."""
    check_images(images, multiple_of=patch_size)
    x = images[:, 0].unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The square images whose `patchify` is `patches` (batch, n * n, patch_size**2)."""
    per_side = round(patches.shape[1] ** 0.5)
    x = patches.unflatten(2, (patch_size, patch_size)).unflatten(1, (per_side, per_side))
    return x.transpose(2, 3).flatten(3).flatten(1, 2)[:, None]


def check_images(images: Tensor, *, multiple_of: int = 1) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 1 or shape[2] != shape[3]:
        raise ValueError(f"images must have shape (batch, 1, size, size), got {shape}")
    if shape[2] % multiple_of:
        raise ValueError(f"images must have a size that {multiple_of} divides, got {shape[2]}")


def check_sizes(image_size: int, patch_size: int, embed_dim: int) -> None:
    """What every config of images cut into patches must fulfil."""
    for name, value in (("patch_size", patch_size), ("embed_dim", embed_dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if image_size < 1 or image_size % patch_size:
        raise ValueError(
            f"image_size must be a positive multiple of patch_size ({patch_size}), got {image_size}"
        )


class PatchEmbedding(nn.Module):
    """A patch's values to a token, with a learned position: (batch, 1, size, size) -> tokens
    (batch, num_patches, embed_dim)."""

    def __init__(self, image_size: int, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(patch_size**2, embed_dim)
        num_patches = (image_size // patch_size) ** 2
        self.position = nn.Parameter(0.2 * torch.randn(num_patches, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(patchify(images, self.patch_size)) + self.position


class PatchHead(nn.Module):
    """Each token to the values of its patch: the inverse of PatchEmbedding."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(embed_dim, patch_size**2)

    def forward(self, tokens: Tensor) -> Tensor:
        return unpatchify(self.projection(tokens), self.patch_size)


def image_transformer(embed_dim: int, num_heads: int, num_layers: int) -> TransformerEncoder:
    """Pre-norm layers over all tokens, and a norm."""
    layers = [
        TransformerEncoderLayer(
            embed_dim, num_heads, hidden_dim=2 * embed_dim, activation="gelu", norm_first=True
        )
        for _ in range(num_layers)
    ]
    return TransformerEncoder(layers, AddLayerNorm(embed_dim))
