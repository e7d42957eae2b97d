"""The CUDA kernels in the emulator, in processes whose CUDA backend is another one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("emulated_barriers", "emulated_conformance")


def _run_file(name: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "--quiet", "--no-header", "-p", "no:cacheprovider"]
    path = Path(__file__).with_name(f"{name}.py")
    result = subprocess.run(
        [*command, str(path)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    assert " passed" in result.stdout


@pytest.mark.timeout(1500)  # minutes on a free core, but a test run may have little of one
@pytest.mark.parametrize("name", FILES)
def test_emulated(name: str) -> None:
    _run_file(name)


@pytest.mark.timeout(1500)
def test_bounds() -> None:
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        pytest.skip("no g++ here")
    command = [compiler, "-print-file-name=libasan.so"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("this compiler has no AddressSanitizer")
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    _run_file("emulated_bounds", LD_PRELOAD=library, ASAN_OPTIONS=options)
