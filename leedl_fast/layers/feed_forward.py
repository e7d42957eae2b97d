"""The position-wise feed-forward network of a Transformer layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = str | Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`: Hendrycks and Gimpel, "Gaussian Error Linear Units", section 2."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def activation_function(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The function that `activation` names, or `activation` itself if it is a function."""
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be a function or one of {sorted(ACTIVATIONS)}, got {activation!r}"
        )
    return ACTIVATIONS[activation]


def hidden_width(embed_dim: int, hidden_dim: int | None) -> int:
    """hidden_dim, or 4 * embed_dim where it is None."""
    hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
    for name, value in (("embed_dim", embed_dim), ("hidden_dim", hidden_dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return hidden_dim


def feed_forward(
    x: Tensor,
    linear1: nn.Linear,
    activation: Callable[[Tensor], Tensor],
    dropout: nn.Dropout,
    linear2: nn.Linear,
) -> Tensor:
    """The formula apart from the module: Transformer layers own the two linears themselves, so
    that their state dicts are torch.nn's.
    """
    return linear2(dropout(activation(linear1(x))))


class FeedForward(nn.Module):
    """`linear2(dropout(activation(linear1(x))))`, the same for every position.

    Args:
        embed_dim: width of input and output.
        hidden_dim: width in between; None means 4 * embed_dim.
        activation: "relu", "gelu", "gelu_tanh", "quick_gelu", "silu" or a function.
        dropout: probability of dropping a hidden value while training.
        bias: whether the two linears have biases.

    Paper: Vaswani et al., "Attention Is All You Need", equation 2.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        *,
        activation: Activation = "relu",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = hidden_width(embed_dim, hidden_dim)
        self.activation = activation_function(activation)
        self.linear1 = nn.Linear(embed_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)
