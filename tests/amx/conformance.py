"""Cases in bfloat16 with their products on AMX, against float64."""

import torch
from libraries import emulated_counts, processor_has_amx

from leedl_fast.testing.compare import (
    allowed_error,
    expected_outputs_and_gradients,
    max_error,
    outputs_and_gradients,
    poisoned_outputs,
)
from leedl_fast.testing.samples import Case


def multiplications() -> int | None:
    """How many the emulator has executed, or None where AMX is the processor's own."""
    return None if processor_has_amx() else emulated_counts()["tdpbf16ps"]


def assert_conforms(case: Case, *, on_tiles: bool) -> None:
    """on_tiles: whether the case has products that must be on AMX."""
    expected = expected_outputs_and_gradients(case, torch.bfloat16)
    plain = outputs_and_gradients(case, torch.bfloat16, "eager")
    before = multiplications()
    with poisoned_outputs():
        actual = outputs_and_gradients(case, torch.bfloat16, "cpu")
    if before is not None and on_tiles:
        assert multiplications() > before
    errors = {
        name: (
            max_error(actual[name], expected[name]),
            allowed_error(plain[name], expected[name], torch.bfloat16),
        )
        for name in expected
    }
    assert not {name: both for name, both in errors.items() if not both[0] <= both[1]}
