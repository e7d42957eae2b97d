"""Residual addition and layer normalisation in one pass over the data."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.ops.add_layer_norm import add_layer_norm


def dropout_inside(dropout: nn.Module | None, x: Tensor) -> tuple[Tensor, float]:
    """x and the probability that `add_layer_norm` is left to drop it with: that of an nn.Dropout,
    and 0 after any other module has acted on x."""
    if dropout is None:
        return x, 0.0
    if type(dropout) is nn.Dropout and dropout.p < 1:
        return x, dropout.p if dropout.training else 0.0
    return dropout(x), 0.0


def widened(x: Tensor, residual: Tensor) -> Tensor:
    """x in the dtype of x + residual, for a post-norm layer, whose `normed` is the next residual.

    Under torch.autocast a sublayer gives bfloat16 or float16 beside a float32 residual; normed has
    the dtype of x, and would lose the residual's digits at every layer.
    """
    return x.to(torch.promote_types(x.dtype, residual.dtype))


class AddLayerNorm(nn.Module):
    """`summed = x + residual`, `normed = norm(summed) * weight + bias`.

    Parameters are named as in `torch.nn.LayerNorm`.

    Args:
        embed_dim: size of the last dimension, over which the statistics are taken.
        eps: added to the variance (norm="layer") or the mean square (norm="rms").
        norm: "layer" or "rms"; "rms" has no bias.
        bias: whether norm="layer" has a bias.

    Shapes: x and residual (..., embed_dim); returns (normed, summed), both of x's shape. With
    residual=None nothing is added, and summed is x itself: so begins a stack of layers that hand
    (branch, residual) on to each other. A `dropout` module acts on x first; an nn.Dropout does so
    inside the op, with a seed from torch's default generator.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        eps: float = 1e-5,
        norm: Literal["layer", "rms"] = "layer",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, got {embed_dim}")
        if norm not in ("layer", "rms"):
            raise ValueError(f'norm must be "layer" or "rms", got {norm!r}')
        self.embed_dim = embed_dim
        self.eps = eps
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(embed_dim, device=device, dtype=dtype))
        if bias and norm == "layer":
            self.bias = nn.Parameter(torch.zeros(embed_dim, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_torch(cls, module: nn.LayerNorm) -> AddLayerNorm:
        """A copy of `module` with its own parameters."""
        if len(module.normalized_shape) != 1 or module.weight is None:
            raise ValueError(
                "module must have elementwise_affine and one normalized dimension, "
                f"got {module.elementwise_affine} and {tuple(module.normalized_shape)}"
            )
        copy = cls(
            module.normalized_shape[0],
            eps=module.eps,
            bias=module.bias is not None,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        copy.load_state_dict(module.state_dict())
        return copy.train(module.training)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, dropout: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        if residual is not None:
            x, dropout_p = dropout_inside(dropout, x)
            return add_layer_norm(
                x,
                residual,
                self.weight,
                self.bias,
                eps=self.eps,
                norm=self.norm,
                dropout_p=dropout_p,
            )
        if dropout is not None:
            x = dropout(x)
        shape = (self.embed_dim,)
        if self.norm == "layer":
            return F.layer_norm(x, shape, self.weight, self.bias, self.eps), x
        return F.rms_norm(x, shape, self.weight, self.eps), x

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, eps={self.eps}, norm={self.norm!r}"
