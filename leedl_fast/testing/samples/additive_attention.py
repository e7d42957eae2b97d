"""Sample problems of additive attention."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leedl_fast.ops import additive_attention
from leedl_fast.testing.samples.attention import attention_case
from leedl_fast.testing.samples.case import Case, Tensors


def _additive_attention(
    tensors: Tensors,
    backend: str | None,
    *,
    key_lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor]:
    device = tensors["q"].device
    lengths = None if key_lengths is None else torch.tensor(key_lengths, device=device)
    return (additive_attention(*tensors.values(), key_lengths=lengths, backend=backend, **options),)


def _additive(name: str, *sizes: int, one_weight: bool = False, **options: Any) -> Case:
    """The attention case of these sizes, with a score_weight."""
    case = attention_case(name, *sizes, **options)
    num_heads, head_dim = sizes[1], sizes[3]
    shapes = {**case.shapes, "score_weight": (head_dim,) if one_weight else (num_heads, head_dim)}
    return replace(case, op="additive_attention", shapes=shapes, call=_additive_attention)


ADDITIVE_ATTENTION = (
    _additive("one", 1, 1, 1, 1),
    _additive("full", 2, 3, 64, 32),
    _additive("full-odd", 1, 2, 67, 17, one_weight=True),
    _additive("full-long", 1, 1, 500, 64),
    _additive("causal", 2, 2, 65, 64, causal=True),
    _additive("causal-more-keys", 1, 2, 33, 16, seqlen_k=97, causal=True),
    _additive("causal-fewer-keys", 1, 2, 97, 16, seqlen_k=33, causal=True),
    _additive("window", 1, 2, 300, 24, window=(31, 17)),
    _additive("window-self-only", 1, 1, 50, 8, window=(0, 0)),
    _additive("window-more-keys", 1, 2, 129, 16, seqlen_k=400, window=(64, 3)),
    _additive("window-fewer-keys", 1, 2, 400, 16, seqlen_k=129, window=(64, 3)),
    _additive("gqa", 2, 6, 63, 32, heads_k=2, causal=True),
    _additive("mqa-window", 1, 4, 190, 16, heads_k=1, window=(20, 9), one_weight=True),
    _additive("key-lengths", 4, 2, 70, 32, key_lengths=(70, 1, 0, 33)),
    _additive("key-lengths-window", 3, 2, 150, 16, window=(40, 20), key_lengths=(150, 77, 64)),
    _additive("one-query", 2, 4, 1, 64, seqlen_k=333, heads_k=2),
    _additive("one-key", 1, 2, 100, 16, seqlen_k=1),
    _additive("value-wider", 1, 2, 80, 16, head_dim_v=72),
    _additive("value-narrower", 1, 2, 80, 72, head_dim_v=3),
    _additive("window-causal", 2, 2, 37, 8, window=9, causal=True),
    _additive("gqa-lengths", 2, 4, 21, 6, heads_k=2, seqlen_k=35, key_lengths=(35, 17)),
    _additive("head-dim-300", 1, 1, 40, 300, causal=True),
    _additive("head-dim-300-short", 1, 1, 17, 300, causal=True),
    _additive("transposed", 2, 3, 100, 32, transposed=True, window=(30, 30)),
    _additive("unaligned", 1, 2, 77, 20, offset=1, causal=True),
    _additive("saturated", 1, 2, 90, 32, scale=4.0, window=(50, 50)),
    _additive("huge", 1, 2, 90, 32, scale=40.0, causal=True),
    _additive("no-keys", 1, 2, 9, 8, seqlen_k=0),
    _additive("no-queries", 1, 2, 0, 8, seqlen_k=9),
    _additive("no-batch", 0, 2, 9, 8),
)
