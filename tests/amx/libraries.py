"""The C libraries of these tests, and the emulator where the processor has no AMX."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
# The emulator counts what it executes.
INSTRUCTIONS = (
    *("ldtilecfg", "sttilecfg", "tilerelease"),
    *("tilezero", "tileloadd", "tilestored", "tdpbf16ps"),
)


@cache
def processor_has(*flags: str) -> bool:
    """Whether Linux lists all of these among the processor's features."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and set(flags) <= set(cpuinfo.read_text().split())


def processor_has_amx() -> bool:
    return processor_has("amx_tile", "amx_bf16")


@cache
def compiled(name: str) -> Path:
    """The shared library made of `name`.c."""
    compilers = (os.environ.get("CXX", ""), "g++", "c++")
    compiler = next(filter(None, map(shutil.which, compilers)))
    library = Path(tempfile.mkdtemp()) / f"{name}.so"
    flags = ["-std=gnu11", "-O3", "-mavx2", "-mfma", "-ffp-contract=off", "-shared", "-fPIC"]
    command = [compiler, "-x", "c", *flags, str(FOLDER / f"{name}.c"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=100)
    return library


@cache
def instructions() -> ctypes.CDLL:
    """instructions.c, with an AMX to run on: the processor's own, or the emulator's."""
    library = ctypes.CDLL(str(compiled("instructions")))
    if processor_has_amx():
        assert library.request_permission() == 0, "Linux does not let this process use AMX"
    else:
        emulator()
    return library


@cache
def emulator() -> ctypes.CDLL:
    """From now on this process has AMX."""
    return ctypes.CDLL(str(compiled("emulator")))


def emulated_counts() -> dict[str, int]:
    """How often the emulator executed each instruction."""
    counts = (ctypes.c_uint64 * len(INSTRUCTIONS)).in_dll(emulator(), "amx_emulator_counts")
    return dict(zip(INSTRUCTIONS, counts, strict=True))
