"""The CUDA kernels in the emulator, in processes whose CUDA backend is another one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = (("emulated_barriers",), ("emulated_conformance", "emulated_attention"))


def _run_files(*names: str, **environment: str) -> None:
    """In one process, which compiles the kernels once."""
    command = [sys.executable, "-m", "pytest", "--quiet", "--no-header", "-p", "no:cacheprovider"]
    paths = [str(Path(__file__).with_name(f"{name}.py")) for name in names]
    result = subprocess.run(
        [*command, *paths], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    assert " passed" in result.stdout


@pytest.mark.timeout(1500)  # minutes on a free core, but a test run may have little of one
@pytest.mark.parametrize("names", FILES, ids="+".join)
def test_emulated(names: tuple[str, ...]) -> None:
    _run_files(*names)


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
    _run_files("emulated_bounds", LD_PRELOAD=library, ASAN_OPTIONS=options)
