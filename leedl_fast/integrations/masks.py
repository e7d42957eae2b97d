"""Other people's masks as options of `attention`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leedl_fast.ops.scaled_dot_product_attention import as_bias


class Mask(NamedTuple):
    """Both as `attention` takes them."""

    key_lengths: Tensor | None = None
    bias: Tensor | None = None

    def add(self, bias: Tensor) -> Mask:
        return self._replace(bias=bias if self.bias is None else self.bias + bias)


def padding(seen: Tensor, dtype: torch.dtype) -> Mask:
    """Which keys a sample has, booleans (batch, seqlen_k), as `key_lengths` where they come first,
    as a `bias` where they do not, or as nothing where it has them all.

    That depends on values, which a graph cannot ask for: there it is a bias.
    """
    if not torch.compiler.is_compiling():
        lengths = seen.sum(1)
        if bool((lengths == seen.shape[1]).all()):
            return Mask()
        position = torch.arange(seen.shape[1], device=seen.device)
        if torch.equal(seen, position < lengths[:, None]):
            return Mask(key_lengths=lengths)
    return Mask(bias=as_bias(seen, dtype)[:, None, None, :])
