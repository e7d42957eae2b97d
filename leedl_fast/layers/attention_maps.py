"""Attention weights of a model's layers, on request: the fused kernels never hold them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from leedl_fast.layers.attention_layer import AttentionLayer


@contextlib.contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While the context is open, each call of an AttentionLayer in `model` leaves its weights
    (batch, num_heads, seqlen_q, seqlen_k), without dropout, under the module's name.

    They are computed a second time, in plain PyTorch: quadratic in time and memory. Of calls with a
    cache the first one leaves them: a text to go on from, and not each token that is added.
    """
    maps: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(module: Any, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            kept = dict(options)
            kept.pop("need_weights", None)
            cache = kept.pop("cache", None)
            if cache is None or cache.length == 0:
                maps[name] = module.attention_weights(*arguments, **kept).detach()

        return hook

    handles = [
        module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, AttentionLayer)
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
