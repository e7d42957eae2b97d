"""The CUDA kernels in the emulator, in processes whose CUDA backend is another one."""

import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(path.name for path in Path(__file__).parent.glob("emulated_*.py"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in FILES if name != "emulated_module.py"])
def test_emulated(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "--quiet", "--no-header", "-p", "no:cacheprovider"]
    path = Path(__file__).with_name(name)
    result = subprocess.run([*command, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    assert " passed" in result.stdout
