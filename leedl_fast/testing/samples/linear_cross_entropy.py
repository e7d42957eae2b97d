"""Sample problems of a linear layer with the cross-entropy of its logits."""

from typing import Any

import torch
from torch import Tensor

from leedl_fast.ops import linear_cross_entropy
from leedl_fast.testing.samples.case import Case, Tensors


def _linear_cross_entropy(
    tensors: Tensors, backend: str | None, *, ignored: str = "some", **options: Any
) -> tuple[Tensor]:
    rows, vocab_size = tensors["hidden"].shape[:-1], tensors["weight"].shape[0]
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(vocab_size, rows, generator=generator)
    ignored_rows = (
        torch.rand(rows, generator=generator) < {"none": 0, "some": 0.2, "all": 1}[ignored]
    )
    targets[ignored_rows] = options.get("ignore_index", -100)
    targets = targets.to(tensors["hidden"].device)
    hidden, weight, bias = tensors["hidden"], tensors["weight"], tensors.get("bias")
    return (linear_cross_entropy(hidden, weight, targets, bias=bias, backend=backend, **options),)


def _cross_entropy_case(
    name: str,
    rows: tuple[int, ...],
    in_features: int,
    vocab_size: int,
    *,
    bias: bool = False,
    scale: float = 0.5,
    offset: int = 0,
    **options: Any,
) -> Case:
    shapes: dict[str, tuple[int, ...]] = {
        "hidden": (*rows, in_features),
        "weight": (vocab_size, in_features),
    }
    shapes |= {"bias": (vocab_size,)} if bias else {}
    call = _linear_cross_entropy
    return Case("linear_cross_entropy", name, shapes, call, scale, offset=offset, options=options)


LINEAR_CROSS_ENTROPY = (
    _cross_entropy_case("one", (1,), 1, 1, ignored="none"),
    _cross_entropy_case("small", (2, 40), 64, 100),
    _cross_entropy_case("odd", (67,), 33, 257, bias=True),
    _cross_entropy_case("sum", (3, 29), 48, 131, reduction="sum", ignored="none"),
    _cross_entropy_case("none", (5, 3, 7), 40, 90, reduction="none"),
    _cross_entropy_case(
        "none-smoothed", (50,), 16, 300, reduction="none", bias=True, label_smoothing=0.2
    ),
    _cross_entropy_case("smoothed", (130,), 24, 77, bias=True, label_smoothing=0.1),
    _cross_entropy_case("ignore-a-class", (90,), 32, 11, ignore_index=3),
    _cross_entropy_case("many-rows", (1500,), 20, 65),
    _cross_entropy_case("many-classes", (70,), 24, 9001, scale=0.3),
    _cross_entropy_case("deep", (60,), 700, 150, scale=0.2, bias=True),
    _cross_entropy_case("huge-logits", (60,), 64, 100, scale=10.0),
    _cross_entropy_case("unaligned", (33,), 21, 50, offset=1, bias=True),
    _cross_entropy_case("all-ignored-sum", (9,), 8, 5, reduction="sum", ignored="all"),
    _cross_entropy_case("no-rows", (0,), 8, 5, reduction="sum"),
    _cross_entropy_case("no-rows-none", (0, 4), 8, 5, reduction="none"),
)
