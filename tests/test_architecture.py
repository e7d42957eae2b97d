"""Data flows one way: no module imports one above it. Read from the syntax trees."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "leedl_fast"

# What each part of the package may import from the package, itself aside.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "files": set(),
    "reference": set(),
    "backends": {"config", "kernels"},
    "ops": {"backends", "reference"},
    "testing": {"ops", "backends", "reference"},
    "layers": {"ops", "backends"},
    "data": {"config"},
    "models": {"layers", "ops"},
    "training": {"models", "layers", "ops", "backends", "data", "files", "testing"},
    "integrations": {"layers", "ops", "testing"},
    "distributed": {"layers", "ops"},
    "doctor": {"backends", "config"},
    "tuning": {"files", "ops", "kernels"},
    "cli": {"tuning", "doctor", "training", "data", "benchmarks", "layers", "backends"},
    "__init__": {"backends", "ops", "integrations"},
}


def _imports(source: str) -> set[str]:
    """The parts of leedl_fast that a module's source imports, functions' bodies included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "leedl_fast" and len(part) > 1}


def _violations(part: str, source: str) -> set[str]:
    parts = {path.stem for path in PACKAGE.iterdir()} | {"benchmarks", "kernels"}
    return (_imports(source) & parts) - ALLOWED[part] - {part}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_nothing_imports_upward(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert _violations(part, path.read_text()) == set()


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("reference", "from leedl_fast.ops import attention"),
        ("backends", "from leedl_fast import ops"),
        ("ops", "def f():\n    import leedl_fast.layers.attention"),
        ("layers", "from leedl_fast.models.gpt import GPT"),
        ("models", "from leedl_fast.training.task import Task"),
        ("testing", "from leedl_fast import cli"),
        ("distributed", "from leedl_fast.models.gpt import GPT"),
    ],
)
def test_a_planted_violation_is_found(part: str, source: str) -> None:
    assert _violations(part, source)


def test_compiled_code_knows_no_torch() -> None:
    for path in (PACKAGE.parent / "csrc").rglob("*"):
        if path.is_file():
            includes = [line for line in path.read_text().splitlines() if "#include" in line]
            assert not [line for line in includes if "torch" in line or "ATen" in line], path


def test_inline_ptx_stands_in_two_files() -> None:
    """Whose functions the emulator of tests/cuda has, too."""
    folder = PACKAGE.parent / "csrc" / "cuda"
    users = {path.name for path in folder.iterdir() if re.search(r"\basm\b", path.read_text())}
    assert users == {"instructions.h", "matrix_instructions.h"}


def test_the_environment_is_read_in_one_file() -> None:
    readers = [path.name for path in PACKAGE.rglob("*.py") if "os.environ" in path.read_text()]
    assert readers == ["config.py"]
