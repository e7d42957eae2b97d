"""AMX in processes of their own, where an illegal instruction ends no other test."""

import os
import subprocess
import sys

import pytest
from libraries import FOLDER, compiled, processor_has, processor_has_amx

from leedl_fast.backends import cpu_modules


def run_file(name: str) -> None:
    # pytest's handler of SIGILL would take the emulator's place.
    command = [sys.executable, "-m", "pytest", "--quiet", "--no-header"]
    options = ["-p", "no:cacheprovider", "-p", "no:faulthandler", str(FOLDER / name)]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    memory = {"LD_PRELOAD": str(compiled("poisoned_memory"))}
    environment = {**os.environ, **threads, **memory}
    result = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    assert " passed" in result.stdout


def test_products_are_what_the_processor_has() -> None:
    for isa, module in cpu_modules.modules().items():
        if isa != "avx512":
            assert module.bfloat16_products() == "float32"
        elif processor_has_amx():
            assert module.bfloat16_products() == "AMX"
        else:
            assert module.bfloat16_products() in ("AVX512-BF16", "float32")


@pytest.mark.timeout(900)  # seconds on a free core, but a test run may have little of one
@pytest.mark.skipif(not processor_has("avx2", "fma"), reason="the emulator needs AVX2 and FMA")
def test_instructions() -> None:
    run_file("emulated_instructions.py")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("op", ["attention", "decode", "linear_cross_entropy"])
def test_op(op: str) -> None:
    module = cpu_modules.modules().get("avx512")
    if module is None:
        pytest.skip(cpu_modules.reasons()["avx512"])
    if module.bfloat16_products() == "float32":
        pytest.skip("this processor has no AVX512-BF16, which every processor with AMX has")
    run_file(f"emulated_{op}.py")
