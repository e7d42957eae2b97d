"""Comparison of a layer with the torch.nn module that it copies."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from leedl_fast import use_backend

Call = Callable[..., Tensor]


@pytest.fixture(params=["cpu", "eager"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def results(module: nn.Module, call: Call, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output of `call(module, *inputs)` and every gradient, by name."""
    module.zero_grad()
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    out = call(module, *inputs)
    # Mostly positive: where a bias's gradient, their sum, cancels, rounding is all that one sees.
    generator = torch.Generator().manual_seed(7)
    weight = 1 + torch.randn(out.shape, dtype=torch.float64, generator=generator)
    (out * weight.to(out.dtype)).sum().backward()
    named = {"output": out} | {f"input {i}": x.grad for i, x in enumerate(inputs)}
    named |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: value.detach().double() for name, value in named.items()}


def assert_parity(
    module: nn.Module,
    layer: nn.Module,
    inputs: tuple[Tensor, ...],
    call_module: Call,
    call_layer: Call,
) -> None:
    """`layer` is as near to float64 as `module` is: within twice its worst relative error."""
    exact = results(copy.deepcopy(module).double(), call_module, tuple(x.double() for x in inputs))
    plain = results(module, call_module, inputs)
    fast = results(layer, call_layer, inputs)
    assert fast.keys() == exact.keys()

    def relative_error(name: str, value: Tensor) -> float:
        return ((value - exact[name]).abs().max() / exact[name].abs().max()).item()

    allowed = 2 * max(relative_error(name, plain[name]) for name in exact)
    allowed += torch.finfo(torch.float32).eps
    errors = {name: relative_error(name, fast[name]) for name in exact}
    worse = {name: error for name, error in errors.items() if not error <= allowed}
    assert not worse, f"allowed relative error {allowed:.2e}, got {worse}"


@pytest.fixture(scope="session")
def parity() -> Callable[..., None]:
    return assert_parity
