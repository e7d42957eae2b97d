"""Sinusoidal positional encoding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal_table(num_positions: int, embed_dim: int) -> Tensor:
    """(num_positions, embed_dim) float64: PE(p, 2i) = sin(p / 10000^(2i / embed_dim)), cos beside.

    Made in float64: in float32 the angle of position 65,535 is off by 4e-3 already.
    """
    position = torch.arange(num_positions, dtype=torch.float64)[:, None]
    even = torch.arange(0, embed_dim, 2, dtype=torch.float64)
    angle = position * torch.exp(even * (-math.log(10000.0) / embed_dim))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class SinusoidalPositionalEncoding(nn.Module):
    """`x + PE[offset : offset + seqlen]`.

    Args:
        embed_dim: width of x; even.
        max_length: number of positions that exist.

    Shapes: x (batch, seqlen, embed_dim); the output has the same shape and dtype.

    Paper: Vaswani et al., "Attention Is All You Need", section 3.5.
    """

    table: Tensor

    def __init__(
        self,
        embed_dim: int,
        *,
        max_length: int = 5000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 2 or embed_dim % 2:
            raise ValueError(f"embed_dim must be even and at least 2, got {embed_dim}")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        table = sinusoidal_table(max_length, embed_dim).to(device=device, dtype=dtype)
        # A formula, not a parameter: checkpoints need not hold it.
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor, *, offset: int = 0) -> Tensor:
        max_length, embed_dim = self.table.shape
        if x.dim() != 3 or x.shape[2] != embed_dim:
            raise ValueError(
                f"x must have shape (batch, seqlen, {embed_dim}), got {tuple(x.shape)}"
            )
        end = offset + x.shape[1]
        if offset < 0 or end > max_length:
            raise ValueError(
                f"positions must lie in [0, max_length = {max_length}), got [{offset}, {end})"
            )
        return x + self.table[offset:end].to(x.dtype)
