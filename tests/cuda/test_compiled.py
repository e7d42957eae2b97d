"""What nvcc made of the kernels: for every target, none in local memory."""

import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from leedl_fast.backends import cuda

TARGETS = ("sm_80", "sm_90", "sm_100")
KERNELS = (
    "attention_forward_kernel",
    "attention_delta_kernel",
    "attention_query_kernel",
    "attention_key_value_kernel",
    "randn_kernel",
    "add_noise_kernel",
    "loss_kernel",
    "loss_sum_kernel",
    "loss_backward_kernel",
    "step_kernel",
    "forward_kernel",
    "long_forward_kernel",
    "dropout_backward_kernel",
    "backward_kernel",
    "long_backward_kernel",
    "sum_parts_kernel",
)


def _cuobjdump() -> str:
    """The toolkit's own, else Triton's."""
    found = shutil.which("cuobjdump")
    if found is None and (triton := find_spec("triton")) is not None and triton.origin:
        inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(inside) if inside.exists() else None
    if found is None:
        pytest.skip("no cuobjdump here")
    return found


@cache
def _dump(option: str) -> str:
    if cuda.reason() is not None:
        pytest.skip(str(cuda.reason()))
    command = [_cuobjdump(), option, str(cuda._load().__file__)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _usage() -> dict[tuple[str, str], dict[str, int]]:
    """What each kernel takes, by target and mangled name."""
    usage, target, name = {}, "", ""
    for line in _dump("-res-usage").splitlines():
        if (found := re.match(r"arch = (\w+)", line)) is not None:
            target = found[1]
        elif (found := re.match(r"\s*Function (\w+):", line)) is not None:
            name = found[1]
        elif "REG:" in line:
            usage[target, name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return usage


def test_every_kernel_is_there_for_every_target() -> None:
    names = [(target, name) for target, name in _usage() if target in TARGETS]
    for kernel in KERNELS:
        counts = Counter(target for target, name in names if re.search(rf"\d{kernel}", name))
        assert set(counts) == set(TARGETS), kernel
        assert len(set(counts.values())) == 1, kernel


def test_no_kernel_spills() -> None:
    spilled = {key: usage for key, usage in _usage().items() if usage["STACK"] or usage["LOCAL"]}
    assert not spilled


def test_the_newest_ptx_is_there() -> None:
    assert re.search(r"PTX file +\d+: \S*sm_100\S*\.ptx", _dump("-lptx"))


@pytest.mark.parametrize("target", TARGETS)
def test_whole_vectors_are_loaded_and_stored(target: str) -> None:
    """By every kernel over whole tensors, however the compiler may feel about it."""
    instructions: dict[str, Counter[str]] = {}
    name, is_target = "", False
    for line in _dump("-sass").splitlines():
        if (found := re.search(r"arch = (\w+)", line)) is not None:
            is_target = found[1] == target
        elif (found := re.match(r"\s*Function : (\w+)", line)) is not None:
            name = found[1]
        elif is_target and (found := re.search(r"\b(LDG|STG)\.\S*\b128\b", line)) is not None:
            instructions.setdefault(name, Counter())[found[1]] += 1
    for kernel in ("add_noise_kernel", "step_kernel", "forward_kernel", "backward_kernel"):
        of_kernel = [
            counts for name, counts in instructions.items() if re.search(rf"\d{kernel}", name)
        ]
        assert of_kernel, kernel
        assert all(counts["LDG"] and counts["STG"] for counts in of_kernel), kernel
