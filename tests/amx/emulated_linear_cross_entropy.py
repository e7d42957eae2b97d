"""The linear layer + cross-entropy in bfloat16 with its products on AMX; `test_amx.py` runs this
file in a process of its own, which has an emulator where the processor has no AMX.
"""

from dataclasses import replace
from itertools import product
from types import ModuleType

import pytest
import torch
from conformance import assert_conforms, multiplications
from libraries import emulated_counts, processor_has_amx
from torch import Tensor

from leedl_fast import linear_cross_entropy
from leedl_fast.testing.compare import max_error
from leedl_fast.testing.samples import LINEAR_CROSS_ENTROPY, Case

pytestmark = pytest.mark.usefixtures("module")


def test_products_are_on_amx(module: ModuleType) -> None:
    assert module.bfloat16_products() == "AMX"


WITHOUT_ROWS = ("all-ignored-sum", "no-rows", "no-rows-none")


def _odd_sizes() -> list[Case]:
    """A tile has 16 rows, 32 numbers along the depth; a chunk 224 rows, a block 128 classes."""
    case = next(case for case in LINEAR_CROSS_ENTROPY if case.name == "smoothed")
    sizes = product((1, 223, 225), (1, 33, 100), (1, 15, 17, 113, 130))
    return [
        replace(
            case,
            name=f"{rows}x{in_features}x{vocab_size}",
            shapes={
                "hidden": (rows, in_features),
                "weight": (vocab_size, in_features),
                "bias": (vocab_size,),
            },
            options={**case.options, "ignored": "some" if rows > 1 else "none"},
        )
        for rows, in_features, vocab_size in sizes
    ]


@pytest.mark.parametrize("case", [*LINEAR_CROSS_ENTROPY, *_odd_sizes()], ids=str)
def test_conformance(case: Case) -> None:
    assert_conforms(case, on_tiles=case.name not in WITHOUT_ROWS)


def _problem(rows: int, in_features: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets and bias; every third row is ignored."""
    shapes = (rows, in_features), (vocab_size, in_features), (vocab_size,)
    hidden, weight, bias = (torch.randn(shape).bfloat16().requires_grad_() for shape in shapes)
    targets = torch.randint(vocab_size, (rows,))
    targets[::3] = -100
    return hidden, weight, targets, bias


def _results(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, **options: object
) -> list[Tensor]:
    """The loss, dhidden, dweight and dbias."""
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, backend="cpu", **options)
    dloss = torch.linspace(-1, 2, max(loss.numel(), 1), dtype=loss.dtype).view_as(loss)
    return [loss, *torch.autograd.grad(loss, (hidden, weight, bias), dloss)]


def _assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(1100, 40, 30), (700, 300, 150), (90, 20, 3500)], ids=str)
def test_threads_and_runs_change_no_bit(shape: tuple[int, int, int], reduction: str) -> None:
    problem = _problem(*shape)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(_results(*problem, reduction=reduction, label_smoothing=0.1))
    for other in results[1:]:
        _assert_same_bits(results[0], other)


def test_strides_and_ignored_rows_change_no_bit() -> None:
    hidden, weight, targets, bias = _problem(230, 35, 150)
    expected = _results(hidden, weight, targets, bias)
    wide_hidden, wide_weight = torch.full((230, 50), torch.nan), torch.full((300, 41), torch.nan)
    wide_hidden[:, 7:42], wide_weight[::2, 3:38] = hidden.detach(), weight.detach()
    wide_hidden[targets == -100] = torch.nan
    strided = wide_hidden.bfloat16()[:, 7:42], wide_weight.bfloat16()[::2, 3:38]
    hidden, weight = (x.requires_grad_() for x in strided)
    _assert_same_bits(_results(hidden, weight, targets, bias), expected)


def test_a_row_does_not_depend_on_the_others() -> None:
    hidden, weight, targets, bias = _problem(300, 50, 150)
    losses = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none")
    dhidden = _results(hidden, weight, targets, bias, reduction="sum")[1]
    for row in (1, 151, 299):
        alone = hidden[row : row + 1], weight, targets[row : row + 1], bias
        loss, dhidden_alone, *_ = _results(*alone, reduction="sum")
        assert torch.equal(loss, losses[row])
        assert torch.equal(dhidden_alone[0], dhidden[row])


@pytest.mark.skipif(processor_has_amx(), reason="only the emulator counts")
@pytest.mark.parametrize("gradients", [False, True])
def test_tiles_are_loaded_once_for_each_product(gradients: bool) -> None:
    """Two by two tiles take four loads for four products, and each sum is stored once."""
    torch.set_num_threads(2)
    rows, in_features, vocab_size = 224, 64, 128
    hidden, weight, _, _ = _problem(rows, in_features, vocab_size)
    targets = torch.randint(vocab_size, (rows,))
    before = emulated_counts()
    with torch.set_grad_enabled(gradients):
        linear_cross_entropy(hidden, weight, targets, backend="cpu")
    counts = {name: count - before[name] for name, count in emulated_counts().items()}
    products = 3 if gradients else 1
    assert counts["tdpbf16ps"] == products * rows * in_features * vocab_size / (16 * 16 * 32)
    assert counts["tileloadd"] == counts["tdpbf16ps"]
    tiles = rows * vocab_size + gradients * (vocab_size + rows) * in_features
    assert counts["tilestored"] == counts["tilezero"] == tiles / (16 * 16)
    assert counts["ldtilecfg"] == counts["tilerelease"] == 2


def test_use_amx_turns_the_tiles_off(module: ModuleType) -> None:
    problem = _problem(100, 64, 150)
    on_tiles = _results(*problem)
    before = multiplications()
    module.use_amx(False)
    try:
        assert module.bfloat16_products() == "AVX512-BF16"
        on_vectors = _results(*problem)
    finally:
        module.use_amx(True)
    assert multiplications() == before
    for tiles, vectors in zip(on_tiles, on_vectors, strict=True):
        assert max_error(tiles, vectors) <= 0.01 * vectors.abs().max()
    _assert_same_bits(_results(*problem), on_tiles)
