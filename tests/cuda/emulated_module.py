"""The CUDA backend on CPU tensors: its kernels, compiled by g++, run in the emulator."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

from leedl_fast.backends import cuda

EMULATOR = Path(__file__).parent / "emulator"
CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Werror"),
]


def _compile(sources: list[Path], includes: list[Path], target: Path, *flags: str) -> Path:
    """A shared library of `sources`, C++ all of them, whatever their names end in."""
    places = (os.environ.get("CXX", ""), "g++", "c++")
    compiler = next(filter(None, map(shutil.which, places)))
    system = [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    command = [compiler, *FLAGS, *flags, *(f"-I{path}" for path in includes)]
    command += [f"-isystem{path}" for path in system]

    def compile_one(source: Path) -> str:
        made = target.parent / f"{source.stem}-{source.suffix[1:]}.o"
        run = [*command, "-x", "c++", "-c", str(source), "-o", str(made)]
        result = subprocess.run(run, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-8000:]
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([compiler, "-shared", *objects, *flags, "-o", str(target)], check=True)
    return target


@cache
def emulator_library() -> Path:
    """One for the process, since the module and the tests of the emulator share its state."""
    return _compile(
        sorted(EMULATOR.glob("*.cpp")),
        [EMULATOR],
        Path(tempfile.mkdtemp()) / "libemulator.so",
        "-fvisibility=default",
    )


def compile_emulated(name: str, sources: list[Path], *flags: str) -> Path:
    """A shared library of sources written for CUDA."""
    library = emulator_library()
    includes = [EMULATOR, CSRC / "cuda", CSRC / "common"]
    target = Path(tempfile.mkdtemp()) / f"{name}.so"
    return _compile(sources, includes, target, *flags, str(library), f"-Wl,-rpath,{library.parent}")


def compiled_module(*flags: str) -> ModuleType:
    """`leedl_fast._cuda`, but emulated."""
    common = sorted((CSRC / "common").glob("*.cpp"))
    sources = [*(CSRC / "cuda").glob("*.cu"), CSRC / "cuda" / "module.cpp", *common]
    spec = importlib.util.spec_from_file_location(
        "_cuda", compile_emulated("_cuda", sources, *flags)
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use_emulator(*flags: str) -> None:
    """From now on this process has the CUDA backend, for CPU tensors, compiled with these flags."""
    sys.modules["leedl_fast._cuda"] = compiled_module(*flags)
    cuda._load.cache_clear()
    cuda.unsupported_device = lambda device: None
    assert cuda.reason() is None
