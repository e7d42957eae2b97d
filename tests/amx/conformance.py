"""Cases in bfloat16 with their products on AMX, against float64."""

import torch
from libraries import emulated_counts, processor_has_amx

from leedl_fast.testing import compare
from leedl_fast.testing.samples import Case


def multiplications() -> int | None:
    """How many the emulator has executed, or None where AMX is the processor's own."""
    return None if processor_has_amx() else emulated_counts()["tdpbf16ps"]


def assert_conforms(case: Case, *, on_tiles: bool) -> None:
    """on_tiles: whether the case has products that must be on AMX."""
    before = multiplications()
    compare.assert_conforms(case, torch.bfloat16, "cpu")
    if before is not None and on_tiles:
        assert multiplications() > before
