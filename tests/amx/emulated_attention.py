"""Attention in bfloat16 with its products on AMX; `test_amx.py` runs this file in a process of its
own, which has an emulator where the processor has no AMX.
"""

import ctypes
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from conformance import assert_conforms, multiplications
from libraries import emulated_counts, processor_has_amx
from torch import Tensor

from leedl_fast import attention
from leedl_fast.testing.compare import allowed_error, max_error
from leedl_fast.testing.samples import ATTENTION, ATTENTION_EXTRAS, Case

pytestmark = pytest.mark.usefixtures("module")


def test_products_are_on_amx(module: ModuleType) -> None:
    assert module.bfloat16_products() == "AMX"


def test_memory_comes_as_nan() -> None:
    """So that no test passes because a kernel's working memory happens to hold zeros."""
    function = ctypes.CDLL(None).aligned_alloc
    function.restype = ctypes.POINTER(ctypes.c_float * 16)
    assert all(number != number for number in function(64, 64).contents)


# These have so few queries that they are products of vectors, or no products at all.
WITHOUT_TILES = ("one", "cross", "one-query", "no-keys", "no-queries", "no-batch", "packed-none")
FEW = ("dropout-one-query", "few-queries-relu", "few-queries-everything")


@pytest.mark.parametrize("case", [*ATTENTION, *ATTENTION_EXTRAS], ids=str)
def test_conformance(case: Case) -> None:
    assert_conforms(case, on_tiles=case.name not in (*WITHOUT_TILES, *FEW))


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


def _gradients(
    tensors: list[Tensor], dout: Tensor, backend: str, **options: object
) -> list[Tensor]:
    out = attention(*tensors, backend=backend, **options)
    return list(torch.autograd.grad(out, tensors, dout.to(out.dtype)))


LONG = [
    # A task owns 512 keys here, 128 to 256 there; blocks of queries have 128.
    ((1, 8, 260, 1101, 24), 8, {}),
    ((1, 8, 520, 1101, 24), 8, {"window": (130, 7)}),
    ((2, 4, 333, 410, 72), 2, {}),
    ((2, 4, 333, 410, 72), 2, {"causal": True}),
    ((2, 4, 333, 410, 72), 2, {"window": (1, 0)}),
    ((2, 4, 410, 333, 33), 2, {"window": (37, 61)}),
    ((2, 4, 410, 333, 160), 2, {"window": 20, "key_lengths": (333, 101)}),
    ((2, 4, 129, 300, 256), 2, {"window": (200, 0), "key_lengths": (31, 0)}),
]


@pytest.mark.parametrize(("sizes", "heads_k", "options"), LONG, ids=str)
def test_gradients_over_many_tiles(sizes: tuple[int, ...], heads_k: int, options: dict) -> None:
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"])
    torch.manual_seed(0)
    tensors = _qkv(*sizes, heads_k=heads_k)
    dout = torch.randn(sizes[0], sizes[1], sizes[2], sizes[4]).bfloat16()
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = _gradients(doubles, dout, "eager", **options)
    plain = _gradients(tensors, dout, "eager", **options)
    actual = _gradients(tensors, dout, "cpu", **options)
    for name, ours, theirs, exact in zip("qkv", actual, plain, expected, strict=True):
        allowed = allowed_error(theirs, exact, torch.bfloat16)
        assert max_error(ours, exact) <= allowed, f"d{name}"


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
    dout = torch.randn(3, 2, 150, 48)
    together = [attention(*tensors, backend="cpu", **options)]
    together += _gradients(tensors, dout, "cpu", **options)
    for i in range(3):
        sample = [x[i : i + 1].detach().requires_grad_() for x in tensors]
        alone = [attention(*sample, backend="cpu", **options)]
        alone += _gradients(sample, dout[i : i + 1], "cpu", **options)
        for first, second in zip(together, alone, strict=True):
            assert torch.equal(first[i : i + 1], second)


def test_keys_beyond_key_lengths_may_hold_nan() -> None:
    tensors = _qkv(2, 2, 70, 100, 64)
    lengths = torch.tensor([100, 77])
    expected = _all(tensors, key_lengths=lengths)
    with torch.no_grad():
        for x in tensors[1:]:
            x[1, :, 77:] = torch.nan
    for actual, before in zip(_all(tensors, key_lengths=lengths), expected, strict=True):
        assert torch.equal(actual, before)


def _counts_of(run: Callable[[], object]) -> dict[str, int]:
    before = emulated_counts()
    run()
    return {name: count - before[name] for name, count in emulated_counts().items()}


@pytest.mark.skipif(processor_has_amx(), reason="only the emulator counts")
@pytest.mark.parametrize("window", [None, (128, 128)], ids=str)
def test_products_of_both_passes_are_on_amx(window: tuple[int, int] | None) -> None:
    """Whole tiles of the keys that tiles of queries see, and no more than those at their edges."""
    torch.set_num_threads(1)
    seqlen, head_dim = 512, 64
    tensors = _qkv(1, 1, seqlen, seqlen, head_dim, heads_k=1)
    out = attention(*tensors, window=window, backend="cpu")
    forward = _counts_of(lambda: attention(*tensors, window=window, backend="cpu"))
    backward = _counts_of(lambda: torch.autograd.grad(out.sum(), tensors, retain_graph=True))

    query, key = torch.arange(seqlen)[:, None], torch.arange(seqlen)
    left, right = window or (seqlen, seqlen)
    seen = (key >= query - left) & (key <= query + right)
    tiles = seen.view(seqlen // 16, 16, seqlen // 16, 16).any(3).any(1).sum().item()
    products = {"forward": 2, "backward": 5}
    for name, counts in (("forward", forward), ("backward", backward)):
        least = products[name] * tiles * head_dim // 32
        assert least <= counts["tdpbf16ps"] <= (1 if window is None else 1.25) * least, name
        # Two by two tiles take four loads for four products, one by four five; sums are loaded too.
        assert counts["tileloadd"] <= 1.4 * counts["tdpbf16ps"], name
        assert counts["ldtilecfg"] == counts["tilerelease"] <= 512 // 64, name


def test_use_amx_turns_the_tiles_off(module: ModuleType) -> None:
    tensors = _qkv(1, 2, 100, 100, 64)
    on_amx = _all(tensors)
    before = multiplications()
    module.use_amx(False)
    try:
        assert module.bfloat16_products() == "AVX512-BF16"
        others = _all(tensors)
    finally:
        module.use_amx(True)
    assert multiplications() == before
    assert max_error(on_amx[1], others[1]) <= 1e-5
    for x, other in zip(on_amx, others, strict=True):
        assert max_error(x, other) <= 0.02 * max(1, other.abs().max().item())
