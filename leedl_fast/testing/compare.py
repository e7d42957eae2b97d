"""Comparison with a better precision: an implementation may be at most twice as far off as plain
PyTorch. float64 judges the other dtypes, and double-double float64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from leedl_fast.ops.contract import OPERATORS
from leedl_fast.testing.double_double import parts
from leedl_fast.testing.double_double_tensor import DoubleDouble
from leedl_fast.testing.samples import Case


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest |actual - expected|; infinities must agree, NaN is all wrong."""
    actual = actual.detach().cpu().double()
    high, low = (part.detach().cpu() for part in parts(expected))
    if actual.shape != high.shape:
        raise ValueError(f"actual must have shape {tuple(high.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return 0.0
    difference = torch.where(actual == high, -low, (actual - high) - low).abs()
    return difference.nan_to_num(nan=torch.inf).max().item()


def equal_bits(x: Tensor, y: Tensor) -> bool:
    """Whether shapes, dtypes and all bits are the same, those of NaN and of zero's sign, too."""
    same_kind = x.shape == y.shape and x.dtype == y.dtype
    return same_kind and torch.equal(*(z.flatten().view(torch.uint8) for z in (x, y)))


def allowed_error(plain: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Twice the error of `plain`, plain PyTorch's result in `dtype`, plus one ulp of the largest
    number.
    """
    if expected.numel() == 0:
        return 0.0
    high = parts(expected).high
    finite = high[high.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    return 2 * max_error(plain, expected) + torch.finfo(dtype).eps * largest


def outputs_and_gradients(
    case: Case,
    dtype: torch.dtype,
    backend: str | None,
    *,
    device: torch.device | str = "cpu",
    draw: int = 0,
) -> dict[str, Tensor]:
    """Every output of the case and the gradient of every input, by name, on `device`.

    The inputs, and the gradients of the outputs, are random numbers rounded to `dtype`.
    """
    return _outputs_and_gradients(case, case.inputs(dtype, dtype, device, draw), dtype, backend)


def expected_outputs_and_gradients(
    case: Case, dtype: torch.dtype, *, draw: int = 0
) -> dict[str, Tensor]:
    """What they should be for the numbers that `dtype` sees: plain PyTorch's in float64, and in
    double-double for float64."""
    tensors = case.inputs(dtype, torch.float64, draw=draw)
    if dtype == torch.float64:
        tensors = {name: DoubleDouble(x.detach()).requires_grad_() for name, x in tensors.items()}
    return _outputs_and_gradients(case, tensors, dtype, "eager")


def assert_conforms(
    case: Case, dtype: torch.dtype, backend: str, *, device: torch.device | str = "cpu"
) -> None:
    """Run the case on outputs that come as NaN; AssertionError where an output or a gradient is
    further off than allowed, NotImplementedError where the backend does not take the case.

    The largest error of a few numbers is a matter of luck, plain PyTorch's as much as a kernel's:
    what is too large for one draw of the inputs must hold for two more.
    """
    unlucky = _too_large(case, dtype, backend, device, 0)
    for draw in (1, 2) if unlucky else ():
        again = _too_large(case, dtype, backend, device, draw)
        if unlucky.keys() & again.keys():
            raise AssertionError(f"(error, allowed) in draw 0: {unlucky}, in draw {draw}: {again}")


def _too_large(
    case: Case, dtype: torch.dtype, backend: str, device: torch.device | str, draw: int
) -> dict[str, tuple[float, float]]:
    """(error, allowed) of the outputs and gradients that are further off than allowed."""
    with poisoned_outputs() as ran:
        actual = outputs_and_gradients(case, dtype, backend, device=device, draw=draw)
    if not ran:
        raise AssertionError(f"no kernel of {backend} ran")
    expected, allowed = _expected_and_allowed(case, dtype, device, draw)
    errors = {name: max_error(actual[name], expected[name]) for name in expected}
    return {
        name: (errors[name], allowed[name]) for name in errors if not errors[name] <= allowed[name]
    }


@cache
def _expected_and_allowed(
    case: Case, dtype: torch.dtype, device: torch.device | str, draw: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What every output and gradient should be, and what it may be off by."""
    expected = expected_outputs_and_gradients(case, dtype, draw=draw)
    plain = outputs_and_gradients(case, dtype, "eager", device=device, draw=draw)
    return expected, {name: allowed_error(plain[name], expected[name], dtype) for name in plain}


def _outputs_and_gradients(
    case: Case, tensors: dict[str, Tensor], rounded_to: torch.dtype, backend: str | None
) -> dict[str, Tensor]:
    outputs = case.run(tensors, backend)
    names = ["out" if i == 0 else f"out{i}" for i in range(len(outputs))]
    results = dict(zip(names, outputs, strict=True))
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(output.shape, generator=generator, dtype=torch.float64)
        .to(rounded_to)
        .to(output.device, output.dtype)
        for output in outputs
    ]
    gradients = torch.autograd.grad(outputs, list(tensors.values()), grads, allow_unused=True)
    for name, gradient in zip(tensors, gradients, strict=True):
        results[f"d{name}"] = torch.zeros_like(tensors[name]) if gradient is None else gradient
    return results


@contextmanager
def poisoned_outputs() -> Iterator[list[str]]:
    """Fill every output that a kernel gets with NaN first; yields the names of the kernels that
    ran.
    """
    ran: list[str] = []
    originals = {name: operator.allocate for name, operator in OPERATORS.items()}

    def poison(name: str) -> Callable[..., tuple[Tensor, ...]]:
        def allocate(*arguments: Any) -> tuple[Tensor, ...]:
            ran.append(name)
            outputs = originals[name](*arguments)
            return tuple(x if x is None else x.fill_(torch.nan) for x in outputs)

        return allocate

    for name, operator in OPERATORS.items():
        operator.allocate = poison(name)
    try:
        yield ran
    finally:
        for name, operator in OPERATORS.items():
            operator.allocate = originals[name]
