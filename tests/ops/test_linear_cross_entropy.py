"""Properties of the fused linear layer + cross-entropy that a comparison of numbers does not show,
and its errors.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leedl_fast import linear_cross_entropy
from leedl_fast.backends import cpu_modules

ISA = pytest.mark.parametrize("isa", cpu_modules.modules())


def _problem(
    rows: int, in_features: int, vocab_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets and bias; every third row is ignored."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, in_features), (vocab_size, in_features), (vocab_size,)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    )
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[::3] = -100
    return hidden, weight, targets, bias


def _results(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, **options: object
) -> list[Tensor]:
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, backend="cpu", **options)
    dloss = torch.linspace(-1, 2, max(loss.numel(), 1), dtype=loss.dtype).view_as(loss)
    return [loss, *torch.autograd.grad(loss, (hidden, weight, bias), dloss)]


@ISA
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(1100, 40, 30), (700, 300, 1000), (90, 20, 5000)], ids=str)
def test_threads_and_runs_change_no_bit(isa: str, shape: tuple, reduction: str) -> None:
    problem = _problem(*shape)
    with cpu_modules.use_isa(isa):
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(_results(*problem, reduction=reduction))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@ISA
def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    hidden, weight, targets, bias = _problem(500, 50, 300)
    with cpu_modules.use_isa(isa):
        losses = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none")
        dhidden = _results(hidden, weight, targets, bias, reduction="sum")[1]
        for row in (1, 250, 499):
            alone = hidden[row : row + 1], weight, targets[row : row + 1], bias
            loss, dhidden_alone, *_ = _results(*alone, reduction="sum")
            assert torch.equal(loss, losses[row])
            assert torch.equal(dhidden_alone[0], dhidden[row])


@ISA
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_have_no_loss_and_no_gradient(isa: str, reduction: str) -> None:
    hidden, weight, targets, bias = _problem(300, 20, 130)
    ignored, kept = targets == -100, targets != -100
    with cpu_modules.use_isa(isa):
        whole = _results(hidden, weight, targets, bias, reduction=reduction)
        with torch.no_grad():
            hidden[ignored] = torch.nan  # not even read
        again = _results(hidden, weight, targets, bias, reduction=reduction)
    for first, second in zip(whole, again, strict=True):
        assert torch.equal(first, second)
    assert torch.equal(whole[1][ignored], torch.zeros_like(hidden[ignored]))
    assert whole[1][kept].any(dim=1).all()
    if reduction == "none":
        assert not whole[0][ignored].any()


@ISA
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_rows_ignored(isa: str, reduction: str) -> None:
    hidden, weight, targets, bias = _problem(20, 8, 30)
    with cpu_modules.use_isa(isa):
        loss, *gradients = _results(
            hidden, weight, torch.full_like(targets, -100), bias, reduction=reduction
        )
    expected = {"mean": torch.nan, "sum": 0.0}[reduction]
    torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
    for gradient in gradients:
        assert not gradient.any()


@ISA
def test_a_constant_added_to_every_logit_changes_nothing(isa: str) -> None:
    hidden, weight, targets, bias = _problem(200, 16, 400, torch.float64)
    with cpu_modules.use_isa(isa):
        for first, second in zip(
            _results(hidden, weight, targets, bias, label_smoothing=0.1),
            _results(hidden, weight, targets, bias + 7, label_smoothing=0.1),
            strict=True,
        ):
            torch.testing.assert_close(first, second)


@ISA
def test_a_class_that_a_bias_of_minus_infinity_rules_out(isa: str) -> None:
    hidden, weight, targets, bias = _problem(50, 16, 300)
    with torch.no_grad():
        targets.clamp_(min=200)
        bias[:200] = -torch.inf  # a whole block of classes
    with cpu_modules.use_isa(isa):
        loss, dhidden, dweight, dbias = _results(hidden, weight, targets, bias)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    torch.testing.assert_close(loss, expected)
    for gradient in (dweight, dbias):
        assert not gradient[:200].any()
        assert gradient[200:].isfinite().all()
    assert dhidden.isfinite().all()


@ISA
def test_a_nan_is_seen(isa: str) -> None:
    hidden, weight, targets, bias = _problem(50, 16, 300)
    with torch.no_grad():
        hidden[7, 3] = torch.nan
    with cpu_modules.use_isa(isa):
        losses = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[7]]


def test_any_strides() -> None:
    hidden, weight, targets, _ = _problem(48, 20, 60)
    strided = hidden.view(6, 8, 20).transpose(0, 1)[..., 3:17]
    expected = F.cross_entropy(
        F.linear(strided, weight[::2, :14]).flatten(0, 1), targets.clamp(max=29)
    )
    actual = linear_cross_entropy(
        strided, weight[::2, :14], targets.clamp(max=29).view(8, 6), backend="cpu"
    )
    torch.testing.assert_close(actual, expected)


def test_a_target_that_only_compiled_code_cannot_see_gives_nan() -> None:
    hidden, weight, targets, _ = _problem(10, 4, 6)
    targets[4] = 6

    def loss(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, reduction="none", backend="cpu")

    with pytest.raises(ValueError, match="targets must lie in"):
        loss(hidden)
    torch._dynamo.reset()
    losses = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    assert losses.isnan().nonzero().tolist() == [[4]]


_PEAK = """
import resource, sys, torch, torch.nn.functional as F
from leedl_fast import linear_cross_entropy
torch.set_num_threads(2)
hidden = torch.randn(4096, 32, requires_grad=True)
weight = torch.randn(20000, 32, requires_grad=True)
targets = torch.randint(20000, (4096,))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
linear_cross_entropy(hidden[:2], weight, targets[:2]).backward()
before = peak()
linear_cross_entropy(hidden, weight, targets, reduction=sys.argv[1]).sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_are_never_held(reduction: str) -> None:
    """They would be 312 MiB here; those of a chunk are 17, and dweight, made three times, 7."""
    command = [sys.executable, "-c", _PEAK, reduction]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(result.stdout) < 80


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": None}, TypeError, "hidden must be a torch.Tensor, got NoneType"),
        ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
        ({"hidden": torch.ones(3, 4).int()}, TypeError, "hidden must be float32.*, got torch.int"),
        ({"hidden": torch.ones(())}, ValueError, "hidden must have a last dimension of at least 1"),
        (
            {"weight": torch.ones(5, 3)},
            ValueError,
            r"weight must have shape \(vocab_size >= 1, 4",
        ),
        ({"weight": torch.ones(0, 4)}, ValueError, r"weight must have shape .*, got \(0, 4\)"),
        ({"weight": torch.ones(5, 4).double()}, TypeError, "weight must have the dtype of hidden"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(5,\), got \(4,\)"),
        ({"bias": torch.ones(5).half()}, TypeError, "bias must have the dtype of hidden"),
        ({"bias": torch.ones(5, device="meta")}, ValueError, "bias must be on the device of hidd"),
        ({"targets": torch.ones(2).long()}, ValueError, r"targets must have shape \(3,\)"),
        ({"targets": torch.ones(3).int()}, TypeError, "targets must be int64, got torch.int32"),
        (
            {"targets": torch.tensor([0, 5, 1])},
            ValueError,
            r"targets must lie in \[0, 4\] or be ignore_index = -100, got 5",
        ),
        ({"targets": torch.tensor([0, -1, 1])}, ValueError, "targets must lie in .*, got -1"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0 of type float"),
        ({"reduction": "max"}, ValueError, "reduction must be one of .*, got 'max'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "hidden": torch.ones(3, 4),
        "weight": torch.ones(5, 4),
        "targets": torch.tensor([0, 1, 4]),
        **change,
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


def test_autocast_promotes_to_the_wider_dtype() -> None:
    """A bfloat16 hidden state, from a linear layer under autocast, and float32 parameters."""
    hidden, weight, targets, bias = _problem(40, 24, 50)
    hidden = hidden.detach().bfloat16().requires_grad_()
    with pytest.raises(TypeError, match=r"weight must have the dtype of hidden, torch\.bfloat16"):
        _results(hidden, weight, targets, bias)
    expected = _results(hidden.detach().float().requires_grad_(), weight, targets, bias)
    with torch.autocast("cpu", torch.bfloat16):
        results = _results(hidden, weight, targets, bias)
    assert [result.dtype for result in results] == [
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted.to(result.dtype))
