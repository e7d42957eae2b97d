"""Attention's CUDA kernels on CPU tensors, in the emulator."""

import ctypes
from typing import Any

import pytest
import torch
from emulated_conformance import check
from emulated_module import emulator_library
from torch import Tensor

from leedl_fast.backends import cuda
from leedl_fast.ops import attention
from leedl_fast.testing.compare import allowed_error, equal_bits, max_error
from leedl_fast.testing.samples import ATTENTION, ATTENTION_EXTRAS, Case
from leedl_fast.testing.samples.attention import attention_case

OTHERS = (
    attention_case("scale-negative", 1, 2, 70, 16, softmax_scale=-0.5, causal=True),
    attention_case("scale-zero", 1, 2, 70, 16, softmax_scale=0.0, window=(20, 3)),
    attention_case("gqa-key-lengths", 2, 4, 40, 64, heads_k=2, seqlen_k=90, key_lengths=(90, 41)),
)
IN_FLOAT16 = ("full-odd", "causal", "gqa", "head-dim-128", "huge-scores", "packed")
SEEDS = (1, 2)


@pytest.mark.parametrize("case", [*ATTENTION, *ATTENTION_EXTRAS, *OTHERS], ids=str)
def test_conformance(case: Case) -> None:
    check(case, torch.bfloat16)


@pytest.mark.parametrize("name", IN_FLOAT16)
def test_conformance_in_float16(name: str) -> None:
    (case,) = (case for case in (*ATTENTION, *ATTENTION_EXTRAS) if case.name == name)
    check(case, torch.float16)


def _tensors(batch: int = 3, seqlen_q: int = 70, seqlen_k: int = 150) -> list[Tensor]:
    """q, k, v and the gradient of out, of two heads that read one."""
    shapes = (2, seqlen_q, 40), (1, seqlen_k, 40), (1, seqlen_k, 24), (2, seqlen_q, 24)
    return [torch.randn(batch, *shape).bfloat16() for shape in shapes]


def _run(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """out, lse, dq, dk, dv"""
    *leaves, dout = tensors
    leaves = [x.clone().requires_grad_() for x in leaves]
    out, lse = attention(*leaves, return_lse=True, backend="cuda", **options)
    return [out, lse, *torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))]


def _equal_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(equal_bits(*pair) for pair in zip(ours, theirs, strict=True))


def test_the_order_of_threads_changes_nothing() -> None:
    set_seed = ctypes.CDLL(str(emulator_library()))._ZN8emulator8set_seedEm
    tensors, results = _tensors(batch=1), []
    for seed in SEEDS:
        set_seed(ctypes.c_uint64(seed))
        results.append(_run(tensors, window=(60, 20)))
    assert _equal_bits(*results)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    tensors = _tensors()
    lengths = torch.tensor([150, 99, 0])
    whole = _run(tensors, causal=True, key_lengths=lengths)
    for i in range(3):
        part = slice(i, i + 1)
        alone = _run([x[part] for x in tensors], causal=True, key_lengths=lengths[part])
        assert _equal_bits(alone, [x[part] for x in whole])


def test_a_sequence_does_not_depend_on_its_pack() -> None:
    tensors = _tensors(batch=1)
    ends_q, ends_k = torch.tensor([0, 33, 33, 70]), torch.tensor([0, 81, 97, 150])
    whole = _run(tensors, causal=True, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k)
    for i in range(3):
        of_q, of_k = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        sides = of_q, of_k, of_k, of_q
        alone = _run([x[:, :, part] for x, part in zip(tensors, sides, strict=True)], causal=True)
        sides = of_q, of_q, of_q, of_k, of_k
        assert _equal_bits(alone, [x[:, :, part] for x, part in zip(whole, sides, strict=True)])


def test_inference_gives_what_training_gives() -> None:
    tensors = _tensors(batch=1)
    with torch.no_grad():
        out = attention(*tensors[:3], window=9, backend="cuda")
    assert _equal_bits([out], _run(tensors, window=9)[:1])


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (9, 30)}], ids=str)
def test_large_heads_without_gradients(options: dict[str, Any]) -> None:
    q, k, v = (torch.randn(1, 2, 70, head_dim).bfloat16() for head_dim in (130, 130, 256))
    expected = attention(q.double(), k.double(), v.double(), backend="eager", **options)
    plain, out = (attention(q, k, v, backend=name, **options) for name in ("eager", "cuda"))
    assert max_error(out, expected) <= allowed_error(plain, expected, q.dtype)
    with pytest.raises(NotImplementedError, match="at most 128 with lse or gradients, got 130"):
        attention(q, k, v, return_lse=True, backend="cuda")


def test_padding_is_not_read() -> None:
    q, k, v, dout = _tensors(batch=1)
    lengths = torch.tensor([77])
    expected = _run([q, k, v, dout], key_lengths=lengths)
    k[:, :, 77:], v[:, :, 77:] = torch.nan, torch.inf
    assert _equal_bits(_run([q, k, v, dout], key_lengths=lengths), expected)


@pytest.mark.parametrize("width", [72, 77])
def test_rows_that_lie_apart(width: int) -> None:
    """Slices of wider rows, which begin at multiples of 16 bytes or not."""
    tensors = _tensors(batch=1)
    wide = [torch.full((*x.shape[:3], width), torch.nan, dtype=x.dtype) for x in tensors]
    slices = [x[..., 8 : 8 + of.shape[3]].copy_(of) for x, of in zip(wide, tensors, strict=True)]
    with torch.no_grad():
        out = attention(*slices[:3], causal=True, backend="cuda")
    assert _equal_bits([out], _run(tensors, causal=True)[:1])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "options", "reason"),
    [
        (torch.float32, 8, {}, "takes bfloat16 and float16, got torch.float32"),
        (torch.bfloat16, 257, {}, "head_dim must be at most 256 without gradients, got 257"),
        (torch.bfloat16, 8, {"softcap": 1.0}, "has no softcap"),
        (torch.bfloat16, 8, {"dropout_p": 0.5}, "has no dropout"),
        (torch.bfloat16, 8, {"normalizer": "relu"}, "has no normalizer 'relu'"),
        (torch.bfloat16, 8, {"bias": torch.zeros(3, 3).bfloat16()}, "has no bias"),
    ],
)
def test_what_it_does_not_take(
    dtype: torch.dtype, head_dim: int, options: dict[str, Any], reason: str
) -> None:
    q = torch.zeros(1, 1, 3, head_dim, dtype=dtype)
    with pytest.raises(NotImplementedError, match=f"cuda: {reason}"):
        attention(q, q, q, backend="cuda", **options)


def test_too_many_rows() -> None:
    q = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16).expand(1, 1, cuda.MAX_SEQLEN + 1, 1)
    with pytest.raises(NotImplementedError, match="cuda: seqlen must be at most 536870912, got 5"):
        attention(q, q, q, backend="cuda")
