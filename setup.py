"""Builds the compiled modules with ninja. Package metadata is in pyproject.toml.

`csrc/cpu` is compiled once per instruction set, each copy into a module of its own. A module that
cannot be built (no compiler, no Python headers, an instruction set that the compiler does not know)
is left out; the reason goes to `leedl_fast/_build.json`, where `leedl-fast doctor` finds it.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU_FLAGS = [
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden",
    "-ffp-contract=off",  # an fma is written where it is meant, so that every build rounds alike
    "-Wall -Wextra -Wno-psabi",
    "-Wno-uninitialized -Wno-maybe-uninitialized",  # GCC 12 warns about its own AVX-512 header
    "-Icsrc/cpu -Icsrc/common",
]
BINDINGS = "module.cpp"  # nothing to optimise but pybind11's templates
X86_FLAGS = {
    "_cpu_avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    "_cpu_avx2": "-march=x86-64-v3",
}


def cpu_modules() -> dict[str, str]:
    """The CPU modules for this processor family, each with the flags that set it apart."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {**(X86_FLAGS if on_x86 else {}), "_cpu_baseline": ""}


def find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "g++", "c++"])), None)


class NinjaBuild(build_ext):
    """Hands the whole graph to ninja: parallel, and incremental with header dependencies."""

    def run(self) -> None:
        # One folder for all builds, so that an editable install and a rebuild share the objects.
        self.folder = Path("build") / f"ninja-{sys.implementation.cache_tag}-{platform.machine()}"
        self.reasons: dict[str, str] = {}
        compiler = find_compiler()
        if compiler is None:
            reason = (
                "no C++ compiler was found when the package was built (looked for $CXX, g++, c++)"
            )
            self.reasons = dict.fromkeys(cpu_modules(), reason)
        else:
            self._write_ninja_file(compiler)
            for extension in self.extensions:
                self._build(extension)
        self._write_report()
        if self.inplace:
            self.copy_extensions_to_source()

    def _write_ninja_file(self, compiler: str) -> None:
        import pybind11
        from ninja.ninja_syntax import Writer

        self.folder.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        with open(self.folder / "build.ninja", "w") as file:
            ninja = Writer(file)
            ninja.variable("builddir", str(self.folder))
            ninja.variable("cxx", compiler)
            ninja.variable("flags", CPU_FLAGS + [f"-isystem {path}" for path in includes])
            ninja.rule(
                "compile",
                "$cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
            ninja.rule("link", "$cxx -shared -fopenmp $in -o $out")
            for extension in self.extensions:
                name = extension.name.rpartition(".")[2]
                flags = f"{cpu_modules()[name]} -DLEEDL_CPU_MODULE={name}"
                objects = []
                for source in extension.sources:
                    target = str(self.folder / name / Path(source).with_suffix(".o").name)
                    extra = f"{flags} -O1" if Path(source).name == BINDINGS else flags
                    objects += ninja.build(target, "compile", source, variables={"extra": extra})
                ninja.build(str(self.folder / f"{name}.so"), "link", objects)

    def _build(self, extension: Extension) -> None:
        name = extension.name.rpartition(".")[2]
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


sources = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
setup(
    ext_modules=[Extension(f"leedl_fast.{name}", sources, optional=True) for name in cpu_modules()],
    cmdclass={"build_ext": NinjaBuild},
)
