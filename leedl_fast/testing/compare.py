"""Comparison with float64: an implementation may be at most twice as far off as plain PyTorch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from leedl_fast.ops.contract import OPERATORS
from leedl_fast.testing.samples import Case


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest |actual - expected|, in float64; infinities must agree, NaN is all wrong."""
    actual, expected = (x.detach().cpu().double() for x in (actual, expected))
    if actual.shape != expected.shape:
        raise ValueError(
            f"actual must have shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
        )
    if actual.numel() == 0:
        return 0.0
    difference = torch.where(actual == expected, 0.0, (actual - expected).abs())
    return difference.nan_to_num(nan=torch.inf).max().item()


def allowed_error(plain: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Twice plain PyTorch's own error, plus one ulp of the largest number, for results in `dtype`.

    plain is plain PyTorch's result in that dtype. float64 has no better reference than itself, so
    there plain is the result in float32, whose error counts by the ratio of the two epsilons, and
    counts once more for the reference, which is as far off.
    """
    if expected.numel() == 0:
        return 0.0
    finite = expected[expected.isfinite()].double().abs()
    largest = finite.max().item() if finite.numel() else 0.0
    epsilon = torch.finfo(dtype).eps
    own_error = max_error(plain, expected) * epsilon / torch.finfo(plain.dtype).eps
    factor = 3 if dtype == torch.float64 else 2
    return factor * own_error + epsilon * largest


def outputs_and_gradients(
    case: Case,
    dtype: torch.dtype,
    backend: str | None,
    *,
    rounded_to: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Every output of the case and the gradient of every input, by name.

    The inputs, and the gradients of the outputs, are random numbers rounded to `rounded_to`
    (`dtype` by default), so that a float64 reference can be made for the very numbers that another
    dtype sees. The results stay on `device`.
    """
    rounded_to = rounded_to or dtype
    tensors = case.inputs(rounded_to, dtype, device)
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
            return tuple(output.fill_(torch.nan) for output in originals[name](*arguments))

        return allocate

    for name, operator in OPERATORS.items():
        operator.allocate = poison(name)
    try:
        yield ran
    finally:
        for name, operator in OPERATORS.items():
            operator.allocate = originals[name]
