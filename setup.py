"""Builds the compiled modules with ninja. Package metadata is in pyproject.toml.

`csrc/cpu` is compiled once per instruction set, each copy into a module of its own, and `csrc/cuda`
once for all NVIDIA GPUs. A module that cannot be built (no compiler, no nvcc, no Python headers, an
instruction set that the compiler does not know) is left out; the reason goes to
`leedl_fast/_build.json`, where `leedl-fast doctor` finds it.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU_FLAGS = [
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden",
    "-ffp-contract=off",  # an fma is written where it is meant, so that every build rounds alike
    "-Wall -Wextra -Wno-psabi",
    "-Wno-uninitialized -Wno-maybe-uninitialized",  # GCC 12 warns about its own AVX-512 header
    "-Icsrc/common",
]
BINDINGS = "module.cpp"  # nothing to optimise but pybind11's templates
CUDA_FLAGS = [
    "-std=c++17 -O3 -fmad=false",  # no contraction, as on the CPU
    "-Xfatbin -compress-all --threads 4",  # of the targets at once
    "-Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra",
    "-Icsrc/cuda -Icsrc/common",
]
# A GPU runs the code of its own generation, or the newest generation's PTX. The order is theirs.
CUDA_TARGETS = ("80", "90", "100")
# torch has another CUDA runtime, whose functions must not take the place of the module's own.
CUDA_LINK_FLAGS = "-shared -cudart static -nodlink -Xlinker --exclude-libs,ALL,--strip-all"
X86_FLAGS = {
    "_cpu_avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    "_cpu_avx2": "-march=x86-64-v3",
}


def cpu_modules() -> dict[str, str]:
    """The CPU modules for this processor family, each with the flags that set it apart."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {**(X86_FLAGS if on_x86 else {}), "_cpu_baseline": ""}


def cpu_flags(name: str) -> str:
    return f"{cpu_modules()[name]} -Icsrc/cpu -DLEEDL_CPU_MODULE={name}"


def find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "g++", "c++"])), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, places)), None)


def cuda_targets(nvcc: str) -> str:
    """The flags for those of CUDA_TARGETS that this nvcc knows; none, where it is too old."""
    result = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    known = [target for target in CUDA_TARGETS if f"sm_{target}" in result.stdout.split()]
    code = [f"-gencode arch=compute_{target},code=sm_{target}" for target in known]
    ptx = [f"-gencode arch=compute_{target},code=compute_{target}" for target in known[-1:]]
    return " ".join(code + ptx)


def _name(extension: Extension) -> str:
    return extension.name.rpartition(".")[2]


class NinjaBuild(build_ext):
    """Hands the whole graph to ninja: parallel, and incremental with header dependencies."""

    def run(self) -> None:
        # One folder for all builds, so that an editable install and a rebuild share the objects.
        self.folder = Path("build") / f"ninja-{sys.implementation.cache_tag}-{platform.machine()}"
        self.reasons: dict[str, str] = {}
        compiler, nvcc = find_compiler(), find_nvcc()
        if compiler is None:
            reason = (
                "no C++ compiler was found when the package was built (looked for $CXX, g++, c++)"
            )
            self.reasons = dict.fromkeys([*cpu_modules(), "_cuda"], reason)
        else:
            if nvcc is None:
                self.reasons["_cuda"] = (
                    "no nvcc was found when the package was built (looked for $CUDA_HOME/bin/nvcc, "
                    "nvcc, /usr/local/cuda/bin/nvcc)"
                )
            elif not cuda_targets(nvcc):
                self.reasons["_cuda"] = (
                    f"{nvcc} knows none of the GPUs sm_{', sm_'.join(CUDA_TARGETS)}"
                )
            self._write_ninja_file(compiler, nvcc)
            for extension in self.extensions:
                if _name(extension) not in self.reasons:
                    self._build(extension)
        self._write_report()
        if self.inplace:
            self.copy_extensions_to_source()

    def _write_ninja_file(self, compiler: str, nvcc: str | None) -> None:
        import pybind11
        from ninja.ninja_syntax import Writer

        self.folder.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        includes = [f"-isystem {path}" for path in includes]
        with open(self.folder / "build.ninja", "w") as file:
            ninja = Writer(file)
            ninja.variable("builddir", str(self.folder))
            ninja.variable("cxx", compiler)
            ninja.variable("flags", CPU_FLAGS + includes)
            ninja.rule(
                "compile",
                "$cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
            ninja.rule("link", "$cxx -shared -fopenmp $in -o $out")
            if nvcc is not None:
                flags = [f"-ccbin {compiler}", *CUDA_FLAGS, cuda_targets(nvcc), *includes]
                ninja.variable("nvcc", nvcc)
                ninja.variable("cuda_flags", flags)
                ninja.rule(
                    "compile_cuda",
                    "$nvcc $cuda_flags -MMD -MF $out.d -c $in -o $out",
                    depfile="$out.d",
                    deps="gcc",
                )
                ninja.rule("link_cuda", f"$nvcc -ccbin {compiler} {CUDA_LINK_FLAGS} $in -o $out")
            for extension in self.extensions:
                name = _name(extension)
                if name not in self.reasons:
                    objects = [self._write_object(ninja, name, path) for path in extension.sources]
                    rule = "link_cuda" if name == "_cuda" else "link"
                    ninja.build(str(self.folder / f"{name}.so"), rule, objects)

    def _write_object(self, ninja: Any, name: str, source: str) -> str:
        """Adds the compilation of one source of one module; returns where the object will be."""
        path = Path(source)
        target = str(self.folder / name / path.with_suffix(".o").name)
        if path.suffix == ".cu":
            ninja.build(target, "compile_cuda", source)
        else:
            flags = "-Icsrc/cuda" if name == "_cuda" else cpu_flags(name)
            flags += " -O1" if path.name == BINDINGS else ""
            ninja.build(target, "compile", source, variables={"extra": flags})
        return target

    def _build(self, extension: Extension) -> None:
        name = _name(extension)
        built = self.folder / f"{name}.so"
        command = [
            sys.executable,
            "-m",
            "ninja",
            "-f",
            str(self.folder / "build.ninja"),
            str(built),
        ]
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(result.stdout, flush=True)
        if result.returncode == 0:
            target = Path(self.get_ext_fullpath(extension.name)) if not self.inplace else None
            target = target or Path(self.build_lib) / self.get_ext_filename(extension.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, target)
        else:
            lines = [line for line in result.stdout.splitlines() if "error" in line]
            self.reasons[name] = (
                "the build failed: " + (lines or result.stdout.splitlines()[-1:])[0]
            )

    def _write_report(self) -> None:
        folder = (
            Path("leedl_fast")
            if self.inplace or self.editable_mode
            else Path(self.build_lib) / "leedl_fast"
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps({"missing": self.reasons}, indent=1))


def sources(*patterns: str) -> list[str]:
    return [str(path) for pattern in patterns for path in sorted(Path("csrc").glob(pattern))]


setup(
    ext_modules=[
        *(
            Extension(f"leedl_fast.{name}", sources("cpu/*.cpp", "common/*.cpp"), optional=True)
            for name in cpu_modules()
        ),
        Extension(
            "leedl_fast._cuda", sources("cuda/*.cu", "cuda/*.cpp", "common/*.cpp"), optional=True
        ),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
