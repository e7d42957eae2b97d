"""Every op, case and dtype against a better precision: at most twice plain PyTorch's own error."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from leedl_fast.backends import cpu_modules
from leedl_fast.testing.compare import (
    allowed_error,
    expected_outputs_and_gradients,
    max_error,
    outputs_and_gradients,
    poisoned_outputs,
)
from leedl_fast.testing.samples import CASES, Case

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@cache
def _expected(case: Case, dtype: torch.dtype, draw: int) -> dict[str, Tensor]:
    return expected_outputs_and_gradients(case, dtype, draw=draw)


@cache
def _allowed(case: Case, dtype: torch.dtype, draw: int) -> dict[str, float]:
    """What every output and gradient may be off by."""
    plain = outputs_and_gradients(case, dtype, "eager", draw=draw)
    expected = _expected(case, dtype, draw)
    return {name: allowed_error(plain[name], expected[name], dtype) for name in plain}


def _too_large(
    case: Case, isa: str, dtype: torch.dtype, draw: int
) -> dict[str, tuple[float, float]]:
    """(error, allowed) of the outputs and gradients that are further off than allowed."""
    expected, allowed = _expected(case, dtype, draw), _allowed(case, dtype, draw)
    with cpu_modules.use_isa(isa), poisoned_outputs() as ran:
        actual = outputs_and_gradients(case, dtype, "cpu", draw=draw)
    assert ran
    errors = {name: max_error(actual[name], expected[name]) for name in expected}
    return {
        name: (errors[name], allowed[name]) for name in errors if not errors[name] <= allowed[name]
    }


def test_every_instruction_set_was_built() -> None:
    """Whatever this processor cannot run is missing for that reason alone."""
    assert "baseline" in cpu_modules.modules(), cpu_modules.reasons()
    for reason in cpu_modules.reasons().values():
        assert reason.startswith("this processor has no"), reason


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("isa", cpu_modules.modules())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case, isa: str, dtype: torch.dtype) -> None:
    """The largest error of a few numbers is a matter of luck, plain PyTorch's as much as a
    kernel's: what is too large for one draw of the inputs must hold for two more.
    """
    unlucky = _too_large(case, isa, dtype, draw=0)
    for draw in (1, 2) if unlucky else ():
        again = _too_large(case, isa, dtype, draw)
        assert not unlucky.keys() & again.keys(), f"draw {draw}: {again}; draw 0: {unlucky}"


@pytest.mark.parametrize("isa", cpu_modules.modules())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inference_gives_what_training_gives(case: Case, isa: str) -> None:
    """Bit by bit, though kernels leave out what only their backward needs."""
    inputs = case.inputs(torch.float32, torch.float32)
    alone = {"return_lse": False} if case.op == "attention" else {}
    inference = replace(case, options={**case.options, **alone})
    with cpu_modules.use_isa(isa), poisoned_outputs() as ran:
        expected = case.run(inputs, "cpu")[0]
        with torch.no_grad():
            actual = inference.run(inputs, "cpu")[0]
    assert len(ran) == 2
    assert torch.equal(actual, expected)
