"""Every op, case and dtype against a better precision: at most twice plain PyTorch's own error."""

from dataclasses import replace

import pytest
import torch

from leedl_fast.backends import cpu_modules
from leedl_fast.testing.compare import assert_conforms, poisoned_outputs
from leedl_fast.testing.samples import CASES, Case

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def test_every_instruction_set_was_built() -> None:
    """Whatever this processor cannot run is missing for that reason alone."""
    assert "baseline" in cpu_modules.modules(), cpu_modules.reasons()
    for reason in cpu_modules.reasons().values():
        assert reason.startswith("this processor has no"), reason


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("isa", cpu_modules.modules())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case, isa: str, dtype: torch.dtype) -> None:
    with cpu_modules.use_isa(isa):
        assert_conforms(case, dtype, "cpu")


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
