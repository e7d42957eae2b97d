"""Sample problems of attention: sizes, masks and heads, and every option beside them."""

from typing import Any

import torch
from torch import Tensor

from leedl_fast.ops import attention
from leedl_fast.testing.samples.case import Case, Tensors


def _attention(tensors: Tensors, backend: str | None, **options: Any) -> tuple[Tensor, ...]:
    is_softmax = options.get("normalizer", "softmax") == "softmax"
    arguments: dict[str, Any] = {"return_lse": is_softmax, **tensors, **options, "backend": backend}
    device = tensors["q"].device
    for name in ("key_lengths", "cu_seqlens_q", "cu_seqlens_k"):
        if name in options:
            arguments[name] = torch.tensor(options[name], dtype=torch.int64, device=device)
    if "alibi_slopes" in options:
        arguments["alibi_slopes"] = torch.tensor(options["alibi_slopes"], device=device)
    results = attention(**arguments)
    return results if isinstance(results, tuple) else (results,)


def attention_case(
    name: str,
    batch: int,
    heads: int,
    seqlen_q: int,
    head_dim: int,
    *,
    heads_k: int | None = None,
    seqlen_k: int | None = None,
    head_dim_v: int | None = None,
    bias: tuple[int, ...] | None = None,
    sinks: bool = False,
    scale: float = 1.0,
    transposed: bool = False,
    offset: int = 0,
    **options: Any,
) -> Case:
    heads_k = heads if heads_k is None else heads_k
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    shapes: dict[str, tuple[int, ...]] = {
        "q": (batch, heads, seqlen_q, head_dim),
        "k": (batch, heads_k, seqlen_k, head_dim),
        "v": (batch, heads_k, seqlen_k, head_dim_v),
    }
    shapes |= {"bias": bias} if bias is not None else {}
    shapes |= {"sinks": (heads,)} if sinks else {}
    return Case("attention", name, shapes, _attention, scale, transposed, offset, options)


_case = attention_case
ATTENTION = (
    _case("one", 1, 1, 1, 1),
    _case("full", 2, 3, 64, 32),
    _case("full-odd", 1, 2, 67, 17),
    _case("full-long", 1, 1, 700, 64),
    _case("causal", 2, 2, 65, 64, causal=True),
    _case("causal-prime", 1, 3, 257, 40, causal=True),
    _case("causal-more-keys", 1, 2, 33, 16, seqlen_k=97, causal=True),
    _case("causal-fewer-keys", 1, 2, 97, 16, seqlen_k=33, causal=True),
    _case("window", 1, 2, 300, 64, window=(31, 17)),
    _case("window-causal", 2, 1, 513, 32, window=100, causal=True),
    _case("window-self-only", 1, 1, 50, 8, window=(0, 0)),
    _case("window-left-unlimited", 1, 1, 200, 24, window=(None, 5)),
    _case("window-right-unlimited", 1, 1, 200, 24, window=(5, None)),
    _case("window-as-wide-as-the-sequence", 1, 2, 96, 16, window=96),
    _case("window-more-keys", 1, 2, 129, 48, seqlen_k=400, window=(64, 3)),
    _case("window-fewer-keys", 1, 2, 400, 48, seqlen_k=129, window=(64, 3)),
    _case("gqa", 2, 6, 63, 32, heads_k=2, causal=True),
    _case("mqa-window", 1, 4, 190, 16, heads_k=1, window=(20, 9)),
    _case("key-lengths", 4, 2, 70, 32, key_lengths=(70, 1, 0, 33)),
    _case("key-lengths-window", 3, 2, 150, 16, window=(40, 20), key_lengths=(150, 77, 64)),
    _case("cross", 2, 2, 5, 64, seqlen_k=129),
    _case("one-query", 2, 4, 1, 64, seqlen_k=333, heads_k=2),
    _case("one-key", 1, 2, 100, 16, seqlen_k=1),
    _case("value-wider", 1, 2, 80, 16, head_dim_v=72),
    _case("value-narrower", 1, 2, 80, 72, head_dim_v=3),
    _case("head-dim-80", 1, 2, 130, 80, causal=True),
    _case("head-dim-96", 1, 1, 130, 96, window=(33, 0)),
    _case("head-dim-128", 1, 1, 140, 128, causal=True),
    _case("head-dim-256", 1, 1, 90, 256, window=16),
    _case("transposed", 2, 3, 100, 32, transposed=True, window=(30, 30)),
    _case("unaligned", 1, 2, 77, 20, offset=1, causal=True),
    _case("huge-scores", 1, 2, 90, 32, scale=40.0, window=(50, 50)),
    _case("scaled", 1, 2, 64, 32, softmax_scale=0.3),
    _case("no-keys", 1, 2, 9, 8, seqlen_k=0),
    _case("no-queries", 1, 2, 0, 8, seqlen_k=9),
    _case("no-batch", 0, 2, 9, 8),
)
_SLOPES = (0.5, 0.0625, 0.25, 2.0)
_PACK: dict[str, Any] = {"cu_seqlens_q": (0, 70, 70, 71, 133), "cu_seqlens_k": (0, 40, 57, 57, 200)}
_SAME_PACK: dict[str, Any] = {"cu_seqlens_q": (0, 33, 34, 34, 150)}
ATTENTION_EXTRAS = (
    _case("bias", 2, 3, 65, 32, bias=(2, 3, 65, 65)),
    _case("bias-for-all", 3, 4, 70, 16, heads_k=2, seqlen_k=131, bias=(131,), causal=True),
    _case("bias-of-heads", 2, 2, 130, 40, bias=(1, 2, 130, 130), window=(40, 9)),
    _case("bias-of-samples", 2, 3, 33, 16, seqlen_k=97, bias=(2, 1, 1, 97)),
    _case("bias-key-lengths", 3, 2, 50, 16, bias=(50, 50), key_lengths=(50, 0, 17)),
    _case("alibi", 1, 4, 130, 32, alibi_slopes=_SLOPES, causal=True),
    _case("alibi-of-samples", 2, 2, 70, 16, seqlen_k=97, alibi_slopes=(_SLOPES[:2], _SLOPES[2:])),
    _case("softcap", 2, 2, 97, 32, softcap=2.5, scale=2.0, window=(50, 20)),
    _case("softcap-huge", 1, 2, 64, 16, softcap=30.0, scale=40.0, causal=True),
    _case("sinks", 2, 4, 75, 32, heads_k=2, sinks=True, window=(20, 0)),
    _case("sinks-and-no-keys", 2, 2, 40, 16, sinks=True, key_lengths=(0, 40)),
    _case("dropout", 2, 2, 67, 32, dropout_p=0.3, seed=7, causal=True),
    _case("dropout-one-query", 2, 4, 1, 64, seqlen_k=77, heads_k=2, dropout_p=0.5, seed=-1),
    _case("few-queries", 2, 6, 5, 32, heads_k=2, seqlen_k=700, window=(400, 0)),
    _case("few-queries-relu", 1, 4, 1, 16, heads_k=1, seqlen_k=530, normalizer="relu"),
    _case(
        *("few-queries-everything", 2, 6, 3, 24),
        heads_k=2,
        seqlen_k=600,
        head_dim_v=40,
        bias=(2, 1, 3, 600),
        sinks=True,
        alibi_slopes=(0.01, 0.02, 0.005, 0.0, 0.03, 0.1),
        softcap=3.0,
        dropout_p=0.2,
        seed=11,
        causal=True,
        key_lengths=(600, 290),
    ),
    _case("few-queries-large-group", 1, 46, 1, 24, heads_k=2, seqlen_k=300),
    _case(
        *("few-queries-large-group-everything", 2, 16, 2, 16),
        heads_k=2,
        seqlen_k=150,
        sinks=True,
        alibi_slopes=(0.01, 0.02, 0.005, 0.0) * 4,
        softcap=3.0,
        dropout_p=0.2,
        seed=11,
        causal=True,
        key_lengths=(150, 90),
    ),
    _case("relu", 2, 2, 80, 32, normalizer="relu", window=(30, 30)),
    _case("relu-key-lengths", 2, 2, 50, 16, normalizer="relu", key_lengths=(0, 33)),
    _case("sigmoid", 2, 2, 80, 32, normalizer="sigmoid", causal=True),
    _case("sigmoid-bias", 1, 2, 65, 16, seqlen_k=90, normalizer="sigmoid", bias=(2, 1, 90)),
    _case("packed", 1, 4, 133, 32, heads_k=2, seqlen_k=200, **_PACK),
    _case("packed-window", 1, 2, 150, 16, window=(20, 3), **_SAME_PACK),
    _case("packed-causal", 1, 2, 133, 64, seqlen_k=200, causal=True, transposed=True, **_PACK),
    _case("packed-alibi", 1, 2, 150, 16, alibi_slopes=((0.5, 1.0),) * 4, **_SAME_PACK),
    _case("packed-none", 1, 2, 0, 16, cu_seqlens_q=(0,)),
    _case(
        *("everything", 2, 4, 91, 24),
        heads_k=2,
        seqlen_k=113,
        head_dim_v=40,
        bias=(2, 1, 91, 113),
        sinks=True,
        alibi_slopes=_SLOPES,
        softcap=3.0,
        dropout_p=0.2,
        seed=3,
        window=(60, 10),
        key_lengths=(113, 80),
    ),
    _case(
        *("packed-everything", 1, 4, 150, 16),
        heads_k=2,
        sinks=True,
        alibi_slopes=_SLOPES,
        softcap=3.0,
        dropout_p=0.2,
        seed=3,
        causal=True,
        **_SAME_PACK,
    ),
)
