"""No kernel reads or writes beyond its tensors or its shared memory: AddressSanitizer watches the
emulator, and torch's allocations.
"""

import os
from typing import Any

import pytest
import torch
from emulated_module import use_emulator

from leedl_fast.backends import cuda
from leedl_fast.testing.compare import outputs_and_gradients
from leedl_fast.testing.samples import CASES, Case

use_emulator("-fsanitize=address")

NAMES = (
    *("causal-fewer-keys", "value-narrower", "key-lengths", "packed"),
    *("one", "odd", "long-rows", "plain", "unaligned", "dropout-odd", "wide-dropout"),
    *("add_noise-vector", "add_noise-noise", "noise_prediction_loss-v_prediction"),
    *("noise_prediction_loss-noise", "ddpm_step-guidance-clip", "ddim_step-eta"),
)
WATCHED = [case for case in CASES if case.op in cuda.TABLE and case.name in NAMES]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype)
        for case in WATCHED
        for dtype in (torch.float32, torch.bfloat16)
        if case.op != "attention" or dtype in cuda.ATTENTION_DTYPES
    ],
    ids=str,
)
def test_bounds(case: Case, dtype: torch.dtype) -> None:
    outputs_and_gradients(case, dtype, "cuda")


def _dies(access: Any) -> bool:
    """Whether a process ends there."""
    child = os.fork()
    if child == 0:
        access()
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


@pytest.mark.parametrize("missing", [0, 1])
def test_an_access_beyond_a_tensor_is_found(missing: int) -> None:
    seeds = torch.ones(2 - missing, dtype=torch.int64)
    assert _dies(lambda: cuda._load().randn(torch.empty(2, 64), seeds)) == bool(missing)
