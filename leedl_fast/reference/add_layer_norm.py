r"""Residual + LayerNorm in plain PyTorch.

    summed = D x + residual     x_hat = (summed - mean) * rstd      normed = x_hat * weight + bias
    rstd = 1 / sqrt(var + eps)  (Ba et al. 2016, equation 4; var is the biased variance of the row)

D is 0 or 1 / (1 - dropout_p) for each element (Srivastava et al. 2014; the mask is that of
`philox.add_layer_norm_dropout_mask`). With dnormed and dsummed the gradients of a scalar loss,
g = dnormed * weight, and n the row's length,

    dresidual = dsummed + rstd * (g - mean(g) - x_hat * mean(g * x_hat)),  dx = D dresidual
    dweight = sum over rows of dnormed * x_hat,  dbias = sum over rows of dnormed

norm="rms" (Zhang and Sennrich 2019, equation 4) has mean = 0 and var = mean(summed^2), and no
mean(g) term.
"""

import torch.nn.functional as F
from torch import Tensor

from leedl_fast.reference.philox import add_layer_norm_dropout_mask


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    norm: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(normed, summed), both of the shape of x: normed in x's dtype, summed in residual's. Where
    dtypes differ everything is computed in the widest.
    """
    summed = add_layer_norm_dropout(x.to(residual.dtype), dropout_p, seed) + residual
    computed, shape = summed, summed.shape[-1:]
    for parameter in (weight, bias):
        if parameter is not None and parameter.dtype.itemsize > computed.dtype.itemsize:
            computed = computed.to(parameter.dtype)
    weight, bias = (p if p is None else p.to(computed.dtype) for p in (weight, bias))
    if norm == "layer":
        normed = F.layer_norm(computed, shape, weight, bias, eps)
    else:
        normed = F.rms_norm(computed, shape, weight, eps)
        normed = normed if bias is None else normed + bias
    return normed.to(x.dtype), summed


def add_layer_norm_dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """D x."""
    if seed is None or dropout_p == 0:
        return x
    n = x.shape[-1]
    keep = add_layer_norm_dropout_mask(seed, x.numel() // n, n, dropout_p)
    return x * keep.view(x.shape) / (1 - dropout_p)
