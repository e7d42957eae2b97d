"""Attention in bfloat16 with its products on AMX; `test_amx.py` runs this file in a process of its
own, which has an emulator where the processor has no AMX.
"""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from libraries import emulated_counts, emulator, processor_has_amx
from torch import Tensor

from leedl_fast import attention
from leedl_fast.backends import cpu_modules
from leedl_fast.testing.compare import (
    allowed_error,
    expected_outputs_and_gradients,
    max_error,
    outputs_and_gradients,
    poisoned_outputs,
)
from leedl_fast.testing.samples import ATTENTION, ATTENTION_EXTRAS, Case


@pytest.fixture(autouse=True, scope="module")
def module() -> Iterator[ModuleType]:
    module = cpu_modules.modules()["avx512"]
    if not processor_has_amx():
        emulator()
        module.use_amx(True)
    with cpu_modules.use_isa("avx512"):
        yield module


def multiplications() -> int | None:
    """How many the emulator has executed, or None where AMX is the processor's own."""
    return None if processor_has_amx() else emulated_counts()["tdpbf16ps"]


def test_products_are_on_amx(module: ModuleType) -> None:
    assert module.bfloat16_products() == "AMX"


# These have so few queries that they are products of vectors, or no products at all.
WITHOUT_TILES = ("one", "cross", "one-query", "no-keys", "no-queries", "no-batch", "packed-none")
FEW = ("dropout-one-query", "few-queries-relu", "few-queries-everything")


@pytest.mark.parametrize("case", [*ATTENTION, *ATTENTION_EXTRAS], ids=str)
def test_conformance(case: Case) -> None:
    expected = expected_outputs_and_gradients(case, torch.bfloat16)
    plain = outputs_and_gradients(case, torch.bfloat16, "eager")
    before = multiplications()
    with poisoned_outputs():
        actual = outputs_and_gradients(case, torch.bfloat16, "cpu")
    if before is not None and case.name not in (*WITHOUT_TILES, *FEW):
        assert multiplications() > before
    errors = {
        name: (
            max_error(actual[name], expected[name]),
            allowed_error(plain[name], expected[name], torch.bfloat16),
        )
        for name in expected
    }
    assert not {name: both for name, both in errors.items() if not both[0] <= both[1]}


def _qkv(*sizes: int, heads_k: int = 2) -> list[Tensor]:
    batch, heads, seqlen_q, seqlen_k, head_dim = sizes
    return [
        torch.randn(batch, h, s, head_dim).bfloat16().requires_grad_()
        for h, s in ((heads, seqlen_q), (heads_k, seqlen_k), (heads_k, seqlen_k))
    ]


def _all(tensors: list[Tensor], **options: object) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    out, lse = attention(*tensors, return_lse=True, backend="cpu", **options)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    loss = (out * weights).sum() + lse.where(lse.isfinite(), 0).sum()
    return [out, lse, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 30)}], ids=str)
def test_scores_are_as_exact_as_float32(options: dict, head_dim: int) -> None:
    """What lse shows, since it is not rounded to bfloat16: the products of q and k are exact."""
    q, k, v = _qkv(1, 2, 333, 300, head_dim)
    _, lse = attention(q, k, v, return_lse=True, backend="cpu", **options)
    tensors = [x.detach().double() for x in (q, k, v)]
    _, expected = attention(*tensors, return_lse=True, backend="eager", **options)
    assert max_error(lse, expected) <= 1e-5


def test_probabilities_meet_their_own_values() -> None:
    """Each query has one key that all of its probability goes to, and returns its value exactly."""
    seqlen, head_dim = 300, 64
    order = torch.randperm(seqlen)
    k = torch.zeros(1, 1, seqlen, 50)
    bits = torch.arange(seqlen)[:, None] >> torch.arange(9) & 1
    k[0, 0, :, 30:39] = bits * 2.0 - 1  # two steps along the depth have a part of them
    v = torch.randn(1, 1, seqlen, head_dim).bfloat16()
    q, k = (100 * k[:, :, order]).bfloat16(), k.bfloat16()
    out = attention(q, k, v, softmax_scale=1.0, backend="cpu")
    assert torch.equal(out, v[:, :, order])


OPTIONS = [
    {},
    {"causal": True},
    {"window": (100, 30)},
    {"window": 64, "causal": True, "key_lengths": (620, 350)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_threads_and_runs_change_no_bit(options: dict) -> None:
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"])
    tensors = _qkv(2, 2, 200, 620, 32, heads_k=1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(_all(tensors, **options))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 9)}], ids=str)
def test_a_sample_does_not_depend_on_its_batch(options: dict) -> None:
    tensors = _qkv(3, 2, 150, 170, 48)
    together = _all(tensors, **options)[:2]
    for i in range(3):
        alone = _all([x[i : i + 1].detach().requires_grad_() for x in tensors], **options)[:2]
        for first, second in zip(together, alone, strict=True):
            assert torch.equal(first[i : i + 1], second)


def test_keys_beyond_key_lengths_may_hold_nan() -> None:
    q, k, v = _qkv(2, 2, 70, 100, 64)
    lengths = torch.tensor([100, 77])
    expected = attention(q, k, v, key_lengths=lengths, backend="cpu")
    with torch.no_grad():
        k[1, :, 77:], v[1, :, 77:] = torch.nan, torch.nan
    assert torch.equal(attention(q, k, v, key_lengths=lengths, backend="cpu"), expected)


@pytest.mark.skipif(processor_has_amx(), reason="only the emulator counts")
@pytest.mark.parametrize("options", [{}, {"window": (128, 128)}], ids=str)
def test_tiles_are_loaded_once_for_each_product(options: dict) -> None:
    """Two by two tiles take four loads for four products; sums go back and forth in addition."""
    torch.set_num_threads(1)
    q, k, v = (x.detach() for x in _qkv(1, 1, 512, 512, 64, heads_k=1))
    before = emulated_counts()
    attention(q, k, v, backend="cpu", **options)
    counts = {name: count - before[name] for name, count in emulated_counts().items()}
    assert counts["tileloadd"] <= 1.125 * counts["tdpbf16ps"]
    row_tiles, key_tiles, steps = 512 // 16, 200 // 16, 64 // 32
    assert counts["tdpbf16ps"] >= 2 * row_tiles * key_tiles * steps
    assert counts["ldtilecfg"] == counts["tilerelease"] <= 512 // 64


def test_use_amx_turns_the_tiles_off(module: ModuleType) -> None:
    tensors = _qkv(1, 2, 100, 100, 64)
    out, lse = _all(tensors)[:2]
    before = multiplications()
    module.use_amx(False)
    try:
        assert module.bfloat16_products() == "AVX512-BF16"
        other, other_lse = _all(tensors)[:2]
    finally:
        module.use_amx(True)
    assert multiplications() == before
    assert max_error(out, other) <= 0.02
    assert max_error(lse, other_lse) <= 1e-5
