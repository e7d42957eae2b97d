"""The contract of every op: checks, outputs, autograd, the public function. One file per op."""

from leedl_fast.ops import diffusion
from leedl_fast.ops.add_layer_norm import add_layer_norm
from leedl_fast.ops.additive_attention import additive_attention
from leedl_fast.ops.attention import attention
from leedl_fast.ops.linear_cross_entropy import linear_cross_entropy
from leedl_fast.ops.scaled_dot_product_attention import scaled_dot_product_attention

__all__ = [
    "add_layer_norm",
    "additive_attention",
    "attention",
    "diffusion",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
]
