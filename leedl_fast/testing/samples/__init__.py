"""Sample problems of every op: the sizes at which kernels break. One file per op; all are here."""

from leedl_fast.testing.samples.add_layer_norm import ADD_LAYER_NORM
from leedl_fast.testing.samples.additive_attention import ADDITIVE_ATTENTION
from leedl_fast.testing.samples.attention import ATTENTION, ATTENTION_EXTRAS
from leedl_fast.testing.samples.case import Case
from leedl_fast.testing.samples.diffusion import DIFFUSION
from leedl_fast.testing.samples.linear_cross_entropy import LINEAR_CROSS_ENTROPY

__all__ = ["ATTENTION", "ATTENTION_EXTRAS", "CASES", "Case"]

CASES = (
    *ATTENTION,
    *ATTENTION_EXTRAS,
    *ADDITIVE_ATTENTION,
    *ADD_LAYER_NORM,
    *DIFFUSION,
    *LINEAR_CROSS_ENTROPY,
)
