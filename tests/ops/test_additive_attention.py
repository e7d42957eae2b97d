"""Properties of additive attention that a comparison of numbers does not show, and its errors."""

import re

import pytest
import torch
from torch import Tensor

from leedl_fast import additive_attention
from leedl_fast.backends import cpu_modules

ISA = pytest.mark.parametrize("isa", cpu_modules.modules())
DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)


def _inputs(*sizes: int, heads_k: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, score_weight."""
    batch, heads, seqlen_q, seqlen_k, head_dim = sizes
    shapes = [
        (batch, heads, seqlen_q, head_dim),
        (batch, heads_k, seqlen_k, head_dim),
        (batch, heads_k, seqlen_k, head_dim),
        (heads, head_dim),
    ]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _all(tensors: list[Tensor], **options: object) -> list[Tensor]:
    """out, dq, dk, dv, dscore_weight."""
    out = additive_attention(*tensors, backend="cpu", **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


@ISA
@DTYPE
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (100, 30), "key_lengths": torch.tensor([300, 150])}],
    ids=["full", "causal", "window"],
)
def test_threads_and_runs_change_no_bit(isa: str, dtype: torch.dtype, options: dict) -> None:
    tensors = _inputs(2, 4, 250, 300, 8, dtype=dtype)
    with cpu_modules.use_isa(isa):
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(_all(tensors, **options))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@ISA
def test_a_sample_does_not_depend_on_its_batch(isa: str) -> None:
    tensors = _inputs(3, 4, 130, 150, 12)
    with cpu_modules.use_isa(isa):
        out, dq, dk, dv, _ = _all(tensors, window=(70, 20))
        gradient = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).float()
        for b in range(3):
            single = [x[b : b + 1].detach().requires_grad_() for x in tensors[:3]]
            alone = additive_attention(*single, tensors[3], window=(70, 20), backend="cpu")
            assert torch.equal(alone, out[b : b + 1])
            gradients = torch.autograd.grad(alone, single, gradient[b : b + 1])
            for got, whole in zip(gradients, (dq, dk, dv), strict=True):
                assert torch.equal(got, whole[b : b + 1])


@ISA
def test_a_window_as_wide_as_the_sequence_is_none(isa: str) -> None:
    tensors = _inputs(1, 2, 130, 130, 20)
    with cpu_modules.use_isa(isa):
        for windowed, full in zip(_all(tensors, window=130), _all(tensors), strict=True):
            assert torch.equal(windowed, full)


@ISA
def test_what_goes_from_queries_to_keys_changes_nothing(isa: str) -> None:
    """Only q + k enters the scores."""
    q, k, v, score_weight = _inputs(1, 2, 90, 90, 16, dtype=torch.float64)
    c = torch.randn(16, dtype=torch.float64)
    with cpu_modules.use_isa(isa):
        out = _all([q, k, v, score_weight], window=20)
        shifted = _all([q + c, k - c, v, score_weight], window=20)
    for got, wanted in zip(shifted, out, strict=True):
        torch.testing.assert_close(got, wanted)


@ISA
def test_products_and_direct_terms_agree(isa: str) -> None:
    """One number beyond the range of the products makes its strip and block use q + k itself."""
    tensors = _inputs(1, 2, 140, 140, 16, dtype=torch.float64)
    with cpu_modules.use_isa(isa), torch.no_grad():
        for tensor in tensors[:2]:
            tensor[:, :, 100:, 15] = 25.0
        tensors[3][:, 15] = 0.0
        without = [x[..., :15] if i != 2 else x for i, x in enumerate(tensors)]
        expected = additive_attention(*without, backend="cpu")
        actual = additive_attention(*tensors, backend="cpu")
    torch.testing.assert_close(actual, expected)


@ISA
def test_infinite_and_saturated_inputs_give_their_limits(isa: str) -> None:
    q, k, v, score_weight = (x.detach() for x in _inputs(1, 2, 5, 7, 3))
    q[..., 0], q[..., 1], k[..., 2] = torch.inf, -1e30, 3e38
    with cpu_modules.use_isa(isa):
        actual = additive_attention(q, k, v, score_weight, backend="cpu")
    torch.testing.assert_close(actual, v.mean(2, keepdim=True).expand_as(actual))


@ISA
def test_keys_that_are_not_visible_may_hold_anything(isa: str) -> None:
    q, k, v, score_weight = _inputs(1, 2, 200, 200, 16)
    lengths = torch.tensor([117])
    with cpu_modules.use_isa(isa):
        expected = _all([q, k, v, score_weight], window=50, key_lengths=lengths)
        poisoned_k, poisoned_v = k.detach().clone(), v.detach().clone()
        poisoned_k[:, :, 117:] = torch.nan
        poisoned_v[:, :, 117:] = torch.inf
        poisoned = [q, poisoned_k.requires_grad_(), poisoned_v.requires_grad_(), score_weight]
        actual = _all(poisoned, window=50, key_lengths=lengths)
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


@ISA
def test_rows_that_see_nothing_are_zero(isa: str) -> None:
    tensors = _inputs(1, 2, 60, 20, 16)
    with cpu_modules.use_isa(isa):
        out, dq, *others = _all(tensors, causal=True)  # the first 40 queries see no key
    assert torch.equal(out[:, :, :40], torch.zeros(1, 2, 40, 16))
    assert torch.equal(dq[:, :, :40], torch.zeros(1, 2, 40, 16))
    assert all(gradient.isfinite().all() for gradient in others)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 3, 4)}, ValueError, "q must have 4 dimensions"),
        ({"k": torch.ones(2, 2, 7, 9)}, ValueError, r"k must have shape \(2, 2, 7, 8\), got"),
        ({"v": torch.ones(2, 2, 6, 8)}, ValueError, r"v must have shape \(2, 2, 7, 8\), got"),
        (
            {"score_weight": torch.ones(7)},
            ValueError,
            r"score_weight must have shape \(8,\) or \(4, 8\), got \(7,\)",
        ),
        (
            {"score_weight": torch.ones(8).double()},
            TypeError,
            "score_weight must have the dtype of q",
        ),
        (
            {"score_weight": torch.ones(8, device="meta")},
            ValueError,
            "score_weight must be on the device of q",
        ),
        ({"score_weight": None}, TypeError, "score_weight must be a torch.Tensor, got NoneType"),
        ({"window": -1}, ValueError, r"window must not be negative .*, got \(-1, -1\)"),
        ({"causal": 1}, TypeError, "causal must be a bool, got 1 of type int"),
        ({"key_lengths": torch.tensor([1, 8])}, ValueError, r"must lie in \[0, 7\], got 8"),
        ({"backend": "triton2"}, ValueError, "backend must be one of .*, got 'triton2'"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:40] if isinstance(value, str) else "",
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "q": torch.ones(2, 4, 5, 8),
        "k": torch.ones(2, 2, 7, 8),
        "v": torch.ones(2, 2, 7, 8),
        "score_weight": torch.ones(8),
        **change,
    }
    with pytest.raises(error, match=message):
        additive_attention(**arguments)
