"""Attention for few queries in bfloat16 with its products on AMX; `test_amx.py` runs this file in a
process of its own, which has an emulator where the processor has no AMX.
"""

from types import ModuleType
from typing import Any

import pytest
import torch
from libraries import emulated_counts, processor_has_amx
from torch import Tensor

from leedl_fast import attention
from leedl_fast.testing.compare import allowed_error, max_error, poisoned_outputs

pytestmark = pytest.mark.usefixtures("module")
emulated = pytest.mark.skipif(processor_has_amx(), reason="only the emulator counts")


def inputs(
    *, group: int = 8, seqlen_q: int = 1, seqlen_k: int, head_dim: int, head_dim_v: int = 0
) -> list[Tensor]:
    """q, k, v of two samples with two key heads."""
    sizes = (2 * group, seqlen_q, head_dim), (2, seqlen_k, head_dim)
    sizes = (*sizes, (2, seqlen_k, head_dim_v or head_dim))
    generator = torch.Generator().manual_seed(seqlen_k)
    return [torch.randn(2, *size, generator=generator).bfloat16() for size in sizes]


def run(tensors: list[Tensor], backend: str = "cpu", **options: Any) -> list[Tensor]:
    """out, and lse where there is one; options that are bfloat16 tensors take the dtype of q."""
    dtype = tensors[0].dtype
    for name, option in options.items():
        if isinstance(option, Tensor) and option.dtype == torch.bfloat16:
            options[name] = option.to(dtype)
    if options.get("normalizer", "softmax") != "softmax":
        return [attention(*tensors, backend=backend, **options)]
    return list(attention(*tensors, return_lse=True, backend=backend, **options))


def assert_conforms(tensors: list[Tensor], **options: Any) -> None:
    expected = run([x.double() for x in tensors], "eager", **options)
    plain = run(tensors, "eager", **options)
    before = emulated_counts()["tdpbf16ps"] if not processor_has_amx() else -1
    with poisoned_outputs():
        actual = run(tensors, **options)
    assert processor_has_amx() or emulated_counts()["tdpbf16ps"] > before
    for mine, theirs, right in zip(actual, plain, expected, strict=True):
        assert max_error(mine, right) <= allowed_error(theirs, right, torch.bfloat16)
    if len(actual) == 2:  # lse is not rounded to bfloat16: products of q and k are exact
        assert max_error(actual[1], expected[1]) <= 2e-5


def test_products_are_on_amx(module: ModuleType) -> None:
    assert module.bfloat16_products() == "AMX"


@pytest.mark.parametrize("seqlen_k", [1, 15, 16, 17, 31, 33, 63, 65, 1023, 1025, 2050])
@pytest.mark.parametrize("head_dim", [31, 64])
def test_every_number_of_keys(seqlen_k: int, head_dim: int) -> None:
    assert_conforms(inputs(seqlen_k=seqlen_k, head_dim=head_dim))


@pytest.mark.parametrize("group", [5, 9, 14])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"),
    [(1, 1), (2, 256), (31, 33), (33, 31), (64, 17), (80, 80), (128, 64), (256, 40)],
)
def test_every_size_of_a_head(group: int, head_dim: int, head_dim_v: int) -> None:
    assert_conforms(inputs(group=group, seqlen_k=77, head_dim=head_dim, head_dim_v=head_dim_v))


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (70, 3)},
    "window-left": {"window": (1300, 0)},
    "softcap": {"softcap": 2.5},
    "alibi": {"alibi_slopes": torch.linspace(0, 0.1, 8)},
    "bias": {"bias": torch.linspace(-1, 1, 3 * 1310).view(3, 1310).bfloat16()},
    "sinks": {"sinks": torch.linspace(-3, 3, 8).bfloat16()},
    "dropout": {"dropout_p": 0.3, "seed": 7},
    "relu": {"normalizer": "relu"},
    "sigmoid": {"normalizer": "sigmoid"},
    "scaled-down": {"softmax_scale": -0.2},
}
TOGETHER = ("causal", "softcap", "alibi", "bias", "sinks", "dropout")
OPTIONS["everything"] = {k: v for name in TOGETHER for k, v in OPTIONS[name].items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any]) -> None:
    """12 rows: three queries of each of four heads."""
    assert_conforms(inputs(group=4, seqlen_q=3, seqlen_k=1310, head_dim=40), **options)


@pytest.mark.parametrize("lengths", [(1100, 77), (1, 0), (1024, 1041)], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": (333, 0)}, {"normalizer": "relu"}], ids=str)
def test_keys_beyond_key_lengths_may_hold_nan(
    lengths: tuple[int, int], options: dict[str, Any]
) -> None:
    q, k, v = inputs(seqlen_q=1, seqlen_k=1100, head_dim=64)
    key_lengths = torch.tensor(lengths)
    expected = run([q, k, v], key_lengths=key_lengths, **options)
    for sample, length in enumerate(lengths):
        k[sample, :, length:], v[sample, :, length:] = torch.nan, torch.nan
    actual = run([q, k, v], key_lengths=key_lengths, **options)
    for first, second in zip(actual, expected, strict=True):
        assert torch.equal(first, second)
        assert not second.isnan().any()


def with_stride(x: Tensor, stride: int) -> Tensor:
    """The same numbers in rows that are `stride` numbers apart, and NaN between them."""
    storage = x.new_full((*x.shape[:-1], stride), torch.nan)
    return storage[..., : x.shape[-1]].copy_(x)


@pytest.mark.parametrize("seqlen_k", [64, 99])
def test_strides_change_no_bit(seqlen_k: int) -> None:
    tensors = inputs(seqlen_k=seqlen_k, head_dim=64)
    expected = run(tensors)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for strided in (transposed, *([with_stride(x, n) for x in tensors] for n in (65, 90))):
        for first, second in zip(run(strided), expected, strict=True):
            assert torch.equal(first, second)


SHAPES = [{"group": 5}, {"group": 14}, {"group": 2, "seqlen_q": 4}]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": (1500, 1)}], ids=str)
def test_threads_change_no_bit(sizes: dict[str, int], options: dict[str, Any]) -> None:
    tensors = inputs(**sizes, seqlen_k=2500, head_dim=48)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(tensors, **options))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", [None, (1200, 1033)], ids=str)
def test_a_sample_does_not_depend_on_its_batch(
    sizes: dict[str, int], lengths: tuple[int, int] | None
) -> None:
    tensors = inputs(**sizes, seqlen_k=1200, head_dim=48)
    key_lengths = None if lengths is None else torch.tensor(lengths)
    together = run(tensors, key_lengths=key_lengths)
    for i in range(2):
        own = None if key_lengths is None else key_lengths[i : i + 1]
        alone = run([x[i : i + 1] for x in tensors], key_lengths=own)
        for first, second in zip(together, alone, strict=True):
            assert torch.equal(first[i : i + 1], second)


@emulated
@pytest.mark.parametrize("rows", range(1, 15))
def test_three_rows_and_more_are_on_tiles(rows: int) -> None:
    """Each tile of keys and of values is multiplied once; fewer rows are products of vectors."""
    tensors = inputs(group=rows, seqlen_k=1024, head_dim=64)
    before = emulated_counts()
    run(tensors)
    counts = {name: count - before[name] for name, count in emulated_counts().items()}
    tiles = 4 * (1024 // 16) * (64 // 32)  # of the keys of four heads in all, and of their values
    assert counts["tdpbf16ps"] == (2 * tiles if rows > 2 else 0)
    assert counts["ldtilecfg"] == counts["tilerelease"] == (1 if rows > 2 else 0)


@emulated
def test_use_amx_turns_the_tiles_off(module: ModuleType) -> None:
    tensors = inputs(seqlen_k=300, head_dim=64)
    out, lse = run(tensors)
    before = emulated_counts()
    module.use_amx(False)
    try:
        other, other_lse = run(tensors)
    finally:
        module.use_amx(True)
    assert emulated_counts() == before
    assert max_error(out, other) <= 0.01
    assert max_error(lse, other_lse) <= 1e-5
