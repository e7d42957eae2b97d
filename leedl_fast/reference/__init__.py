"""The mathematics of every op in plain, differentiable PyTorch: the oracle, and the "eager"
backend.
"""

from leedl_fast.reference import diffusion
from leedl_fast.reference.add_layer_norm import add_layer_norm, add_layer_norm_dropout
from leedl_fast.reference.additive_attention import additive_attention
from leedl_fast.reference.attention import attention
from leedl_fast.reference.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "add_layer_norm",
    "add_layer_norm_dropout",
    "additive_attention",
    "attention",
    "diffusion",
    "linear_cross_entropy",
]
