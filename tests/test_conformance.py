"""Every op, case, dtype and backend against float64: at most twice plain PyTorch's own error."""

from functools import cache

import pytest
import torch
from torch import Tensor

from leedl_fast.backends import cpu_modules
from leedl_fast.testing.compare import (
    allowed_error,
    max_error,
    outputs_and_gradients,
    poisoned_outputs,
)
from leedl_fast.testing.samples import CASES, Case

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@cache
def _expected(case: Case, rounded_to: torch.dtype) -> dict[str, Tensor]:
    return outputs_and_gradients(case, torch.float64, "eager", rounded_to=rounded_to)


@cache
def _allowed(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """What every output and gradient may be off by; see allowed_error for float64."""
    plain_dtype = torch.float32 if dtype == torch.float64 else dtype
    plain = outputs_and_gradients(case, plain_dtype, "eager")
    expected = _expected(case, plain_dtype)
    return {name: allowed_error(plain[name], expected[name], dtype) for name in plain}


def test_every_instruction_set_was_built() -> None:
    """Whatever this processor cannot run is missing for that reason alone."""
    assert "baseline" in cpu_modules.modules(), cpu_modules.reasons()
    for reason in cpu_modules.reasons().values():
        assert reason.startswith("this processor has no"), reason


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("isa", cpu_modules.modules())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case, isa: str, dtype: torch.dtype) -> None:
    expected, allowed = _expected(case, dtype), _allowed(case, dtype)
    with cpu_modules.use_isa(isa), poisoned_outputs() as ran:
        actual = outputs_and_gradients(case, dtype, "cpu")
    assert ran
    errors = {name: max_error(actual[name], expected[name]) for name in expected}
    too_large = {
        name: (errors[name], allowed[name]) for name in errors if not errors[name] <= allowed[name]
    }
    assert not too_large, "(error, allowed)"
