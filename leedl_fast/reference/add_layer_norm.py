r"""Residual + LayerNorm in plain PyTorch.

    summed = x + residual       x_hat = (summed - mean) * rstd      normed = x_hat * weight + bias
    rstd = 1 / sqrt(var + eps)  (Ba et al. 2016, equation 4; var is the biased variance of the row)

With dnormed and dsummed the gradients of a scalar loss, g = dnormed * weight, and n the row's
length,

    dx = dresidual = dsummed + rstd * (g - mean(g) - x_hat * mean(g * x_hat))
    dweight = sum over rows of dnormed * x_hat,  dbias = sum over rows of dnormed

norm="rms" (Zhang and Sennrich 2019, equation 4) has mean = 0 and var = mean(summed^2), and no
mean(g) term.
"""

import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor]:
    """(normed, summed), both of the shape of x."""
    summed = x + residual
    shape = summed.shape[-1:]
    if norm == "layer":
        return F.layer_norm(summed, shape, weight, bias, eps), summed
    normed = F.rms_norm(summed, shape, weight, eps)
    return normed if bias is None else normed + bias, summed
