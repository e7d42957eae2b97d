"""Rotary positional encoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TABLE_LENGTH = (
    4096  # positions whose angles are kept; those beyond are made when they are asked for
)


def rotary_angles(first: int, end: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, (end - first, head_dim / 2) float64, of position / base^(2i / head_dim)."""
    position = torch.arange(first, end, dtype=torch.float64)[:, None]
    angle = position * base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return angle.cos(), angle.sin()


class RotaryPositionalEncoding(nn.Module):
    """Turns the pairs (x_i, x_(i + head_dim / 2)) of queries and keys by an angle that grows with
    the position: their products then depend on the distance alone.

    Args:
        head_dim: size of the last dimension; even.
        base: of the geometric row of wavelengths, from 2 pi to 2 pi * base.

    Shapes: x (batch, num_heads, seqlen, head_dim), its first token at position `offset`; the output
    has the same shape and dtype.

    Paper: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", equation 34.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, *, base: float = 10000.0, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even and at least 2, got {head_dim}")
        self.head_dim = head_dim
        self.base = base
        cos, sin = rotary_angles(0, TABLE_LENGTH, head_dim, base)
        # Formulas, not parameters: checkpoints need not hold them.
        self.register_buffer("cos", cos.to(device, torch.float32), persistent=False)
        self.register_buffer("sin", sin.to(device, torch.float32), persistent=False)

    def forward(self, x: Tensor, *, offset: int = 0) -> Tensor:
        end = offset + x.shape[2]
        if end <= TABLE_LENGTH:
            cos, sin = self.cos[offset:end], self.sin[offset:end]
        else:
            cos, sin = rotary_angles(offset, end, self.head_dim, self.base)
        cos, sin = cos.to(x), sin.to(x)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}"
