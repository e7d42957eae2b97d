"""Properties of attention that a comparison of numbers does not show, and its errors."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leedl_fast import attention
from leedl_fast.backends import cpu_modules
from leedl_fast.ops.contract import OPERATORS
from leedl_fast.reference.attention import visible_keys
from leedl_fast.testing.compare import allowed_error, max_error

ISA = pytest.mark.parametrize("isa", cpu_modules.modules())


def _qkv(*sizes: int, heads_k: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, heads, seqlen_q, seqlen_k, head_dim = sizes
    return [
        torch.randn(batch, h, s, head_dim, dtype=dtype, requires_grad=True)
        for h, s in ((heads, seqlen_q), (heads_k, seqlen_k), (heads_k, seqlen_k))
    ]


def _all(tensors: list[Tensor], **options: object) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    out, lse = attention(*tensors, return_lse=True, backend="cpu", **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    visible = lse.isfinite()
    loss = (out * weights).sum() + lse.where(visible, 0).sum()
    return [out, lse, *torch.autograd.grad(loss, tensors)]


OPTIONS = [
    {},
    {"causal": True},
    {"window": (100, 30)},
    {"window": 64, "causal": True, "key_lengths": (700, 350)},
]


@ISA
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_threads_and_runs_change_no_bit(isa: str, options: dict) -> None:
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"])
    tensors = _qkv(2, 4, 650, 700, 32)
    with cpu_modules.use_isa(isa):
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(_all(tensors, **options))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def _same_bits_for_any_threads(isa: str, run: Callable[[], list[Tensor]]) -> None:
    with cpu_modules.use_isa(isa):
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run())
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias_shape", [(2, 4, 300, 330), (1, 1, 300, 330), (1, 4, 1, 330)])
def test_threads_change_no_bit_of_the_gradients_of_bias_and_sinks(
    isa: str, dtype: torch.dtype, bias_shape: tuple[int, ...]
) -> None:
    tensors = _qkv(2, 4, 300, 330, 32, dtype=dtype)
    bias = torch.randn(bias_shape, dtype=dtype, requires_grad=True)
    sinks = torch.randn(4, requires_grad=True)

    def run() -> list[Tensor]:
        out = attention(
            *tensors,
            bias=bias,
            sinks=sinks,
            dropout_p=0.2,
            seed=5,
            window=(200, 100),
            key_lengths=torch.tensor([330, 90]),
            backend="cpu",
        )
        return [out, *torch.autograd.grad(out.float().square().sum(), [*tensors, bias, sinks])]

    _same_bits_for_any_threads(isa, run)


@ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoding_does_not_depend_on_threads_or_batch(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in _qkv(2, 4, 1, 5000, 40, dtype=dtype))

    def run() -> list[Tensor]:
        lengths = torch.tensor([5000, 1025])
        return list(attention(q, k, v, key_lengths=lengths, return_lse=True, backend="cpu"))

    _same_bits_for_any_threads(isa, run)
    with cpu_modules.use_isa(isa):
        whole = run()[0]
        first = attention(q[:1], k[:1], v[:1], key_lengths=torch.tensor([5000]), backend="cpu")
        expected = attention(q.double(), k.double(), v.double(), backend="eager")
    assert torch.equal(whole[:1], first)
    torch.testing.assert_close(whole[:1].double(), expected[:1], rtol=2e-2, atol=2e-3)


@ISA
def test_a_sequence_does_not_depend_on_its_pack(isa: str) -> None:
    q, k, v = (x.detach() for x in _qkv(1, 4, 700, 700, 32))
    with cpu_modules.use_isa(isa):
        packed = attention(
            q, k, v, causal=True, cu_seqlens_q=torch.tensor([0, 20, 620, 700]), backend="cpu"
        )
        for begin, end in ((20, 620), (620, 700)):
            own = [x[:, :, begin:end] for x in (q, k, v)]
            assert torch.equal(packed[:, :, begin:end], attention(*own, causal=True, backend="cpu"))


@ISA
def test_a_sample_does_not_depend_on_its_batch(isa: str) -> None:
    tensors = _qkv(3, 4, 300, 300, 48)
    with cpu_modules.use_isa(isa):
        whole = _all(tensors, window=(70, 20))
        for b in range(3):
            single = [x[b : b + 1].detach().requires_grad_() for x in tensors]
            out, lse = attention(*single, window=(70, 20), return_lse=True, backend="cpu")
            assert torch.equal(out, whole[0][b : b + 1])
            assert torch.equal(lse, whole[1][b : b + 1])


@ISA
def test_a_window_as_wide_as_the_sequence_is_none(isa: str) -> None:
    tensors = _qkv(1, 2, 130, 130, 32)
    with cpu_modules.use_isa(isa):
        for windowed, full in zip(_all(tensors, window=130), _all(tensors), strict=True):
            torch.testing.assert_close(windowed, full)


@ISA
def test_a_constant_added_to_all_scores_changes_only_lse(isa: str) -> None:
    """k + c adds q . c to a query's scores, the same number for all of its keys."""
    q, k, v = _qkv(1, 2, 90, 90, 16, dtype=torch.float64)
    c = torch.randn(16, dtype=torch.float64)
    with cpu_modules.use_isa(isa):
        out, lse = attention(q, k, v, window=20, return_lse=True, backend="cpu")
        shifted, shifted_lse = attention(q, k + c, v, window=20, return_lse=True, backend="cpu")
    torch.testing.assert_close(shifted, out)
    torch.testing.assert_close(shifted_lse, lse + q @ c / 4)


@ISA
def test_keys_that_are_not_visible_may_hold_anything(isa: str) -> None:
    q, k, v = _qkv(1, 2, 200, 200, 32)
    lengths = torch.tensor([117])
    with cpu_modules.use_isa(isa):
        expected = _all([q, k, v], window=50, key_lengths=lengths)
        poisoned_k, poisoned_v = k.detach().clone(), v.detach().clone()
        poisoned_k[:, :, 117:] = torch.nan
        poisoned_v[:, :, 117:] = torch.inf
        actual = _all(
            [q, poisoned_k.requires_grad_(), poisoned_v.requires_grad_()],
            window=50,
            key_lengths=lengths,
        )
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


@ISA
def test_rows_that_see_nothing_are_zero(isa: str) -> None:
    tensors = _qkv(1, 2, 60, 20, 16)
    with cpu_modules.use_isa(isa):
        out, lse, dq, dk, dv = _all(tensors, causal=True)  # the first 40 queries see no key
    assert torch.equal(out[:, :, :40], torch.zeros(1, 2, 40, 16))
    assert (lse[:, :, :40] == -torch.inf).all()
    assert torch.equal(dq[:, :, :40], torch.zeros(1, 2, 40, 16))
    assert dk.isfinite().all()
    assert dv.isfinite().all()


def test_the_documented_masks() -> None:
    causal = visible_keys(2, 4, 6, 0, None, torch.device("cpu"))
    windowed = visible_keys(2, 4, 1, 0, None, torch.device("cpu"))
    assert causal is not None
    assert windowed is not None
    assert causal.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert windowed.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_the_output_keeps_the_storage_order_of_q() -> None:
    q, k, v = (torch.randn(2, 5, 3, 8).transpose(1, 2) for _ in range(3))
    out = attention(q, k, v, backend="cpu")
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("return_lse", "requires_grad", "wanted"),
    [(False, False, False), (True, False, True), (False, True, True)],
)
def test_statistics_are_made_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, return_lse: bool, requires_grad: bool, wanted: bool
) -> None:
    operator = OPERATORS["attention_forward"]
    allocate, made = operator.allocate, []
    monkeypatch.setattr(
        operator, "allocate", lambda *arguments: made.append(allocate(*arguments)) or made[-1]
    )
    q = torch.randn(1, 2, 5, 8, requires_grad=requires_grad)
    attention(q, q, q, return_lse=return_lse, backend="cpu")
    ((_, *statistics),) = made
    assert [x is not None for x in statistics] == [wanted] * 3


def test_a_strided_last_dimension_and_its_gradients() -> None:
    q = torch.randn(1, 2, 8, 5).transpose(2, 3).requires_grad_()
    out = attention(q, q, q, backend="cpu")
    expected = attention(q, q, q, backend="eager")
    torch.testing.assert_close(out, expected)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), q)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 3, 4)}, ValueError, "q must have 4 dimensions"),
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"q": torch.ones(2, 4, 5, 8).long()}, TypeError, "q must be float32.* got torch.int64"),
        ({"k": torch.ones(2, 2, 7, 9)}, ValueError, r"k must have shape \(2, 2, 7, 8\), got"),
        ({"k": torch.ones(2, 2, 7, 8).double()}, TypeError, "k must have the dtype of q, torch.f"),
        ({"v": torch.ones(2, 2, 6, 8)}, ValueError, r"v must have shape \(2, 2, 7, 8\), got"),
        ({"v": torch.ones(2, 2, 7, 8, device="meta")}, ValueError, "v must be on the device of q"),
        (
            {"k": torch.ones(2, 3, 7, 8), "v": torch.ones(2, 3, 7, 8)},
            ValueError,
            "heads of q must be a multiple of the heads of k, got 4 heads of q and 3 of k",
        ),
        ({"window": -1}, ValueError, r"window must not be negative .*, got \(-1, -1\)"),
        ({"window": (2, -3)}, ValueError, r"window must not be negative .*, got \(2, -3\)"),
        ({"window": (1, 2, 3)}, ValueError, r"window must be \(left, right\), got \(1, 2, 3\)"),
        ({"window": 1.5}, TypeError, "window must be an int, got 1.5 of type float"),
        ({"causal": 1}, TypeError, "causal must be a bool, got 1 of type int"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, got nan"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number, got '1'"),
        ({"key_lengths": torch.tensor([1, 8])}, ValueError, r"must lie in \[0, 7\], got 8"),
        ({"key_lengths": torch.tensor([-1, 2])}, ValueError, r"must lie in \[0, 7\], got -1"),
        ({"key_lengths": torch.tensor([1])}, ValueError, r"key_lengths must have shape \(2,\)"),
        ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths must be int64 or int32"),
        ({"key_lengths": [1, 2]}, TypeError, "key_lengths must be a torch.Tensor, got list"),
        ({"backend": "triton2"}, ValueError, "backend must be one of .*, got 'triton2'"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:40] if isinstance(value, str) else "",
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "q": torch.ones(2, 4, 5, 8),
        "k": torch.ones(2, 2, 7, 8),
        "v": torch.ones(2, 2, 7, 8),
        **change,
    }
    with pytest.raises(error, match=message):
        attention(**arguments)


def test_gradients_of_keys_over_8192_bfloat16_queries_are_no_worse_than_plain_pytorchs() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 1, 8192, 64), (1, 1, 256, 64), (1, 1, 256, 64), (1, 1, 8192, 64))
    q, k, v, dout = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, backend=backend)
        return torch.autograd.grad(out, leaves[1:], dout.to(dtype))

    exact, plain = gradients(torch.float64, "eager"), gradients(torch.bfloat16, "eager")
    for isa in cpu_modules.modules():
        with cpu_modules.use_isa(isa):
            ours = gradients(torch.bfloat16, "cpu")
        for name, actual, other, expected in zip("kv", ours, plain, exact, strict=True):
            assert max_error(actual, expected) <= max_error(other, expected), (isa, f"d{name}")


@ISA
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (130, 7)}], ids=str)
def test_gradients_where_a_task_owns_many_keys(isa: str, options: dict) -> None:
    """Long sequences of many heads are cut into larger chunks of keys than the other cases have."""
    tensors = _qkv(1, 8, 1041, 1101, 16)
    dout = torch.randn(1, 8, 1041, 16, generator=torch.Generator().manual_seed(0))

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = attention(*leaves, backend=backend, **options)
        return torch.autograd.grad(out, leaves, dout.to(dtype))

    exact, plain = gradients(torch.float64, "eager"), gradients(torch.float32, "eager")
    with cpu_modules.use_isa(isa):
        ours = gradients(torch.float32, "cpu")
    for name, actual, other, expected in zip("qkv", ours, plain, exact, strict=True):
        allowed = allowed_error(other, expected, torch.float32)
        assert max_error(actual, expected) <= allowed, f"d{name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seqlen_q", [1, 4, 40])
def test_keys_beyond_key_lengths_may_hold_nan(seqlen_q: int, dtype: torch.dtype) -> None:
    q = torch.randn(2, 4, seqlen_q, 32).to(dtype)
    k, v = (torch.randn(2, 2, 301, 32).to(dtype) for _ in range(2))
    lengths = torch.tensor([301, 77])
    expected = attention(q, k, v, key_lengths=lengths, backend="cpu")
    k[1, :, 77:], v[1, :, 77:] = torch.nan, torch.nan
    assert torch.equal(attention(q, k, v, key_lengths=lengths, backend="cpu"), expected)


@ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_drops_the_same_entries_whatever_the_tiles(isa: str, dtype: torch.dtype) -> None:
    seqlen, window = 600, 200  # 600 keys take several blocks, the window one, one query none

    def kept(queries: int, backend: str, window: int | None = None) -> Tensor:
        q, k = torch.zeros(1, 2, queries, 16), torch.zeros(1, 2, seqlen, 16)
        parts = []
        for values in torch.eye(seqlen).split(200, dim=1):  # out is P itself, 200 keys at a time
            out = attention(
                *(x.to(dtype) for x in (q, k, values.expand(1, 2, -1, -1))),
                window=window,
                dropout_p=0.3,
                seed=11,
                backend=backend,
            )
            parts.append(out != 0)
        return torch.cat(parts, dim=-1)

    expected = kept(seqlen, "eager")
    assert 0.25 < 1 - expected.float().mean() < 0.35
    position = torch.arange(seqlen)
    visible = (position[None, :] - position[:, None]).abs() <= window
    with cpu_modules.use_isa(isa):
        assert torch.equal(kept(seqlen, "cpu"), expected)
        assert torch.equal(kept(seqlen, "cpu", window), expected & visible)
        assert torch.equal(kept(1, "cpu"), expected[:, :, :1])
