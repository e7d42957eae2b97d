"""Files are written whole or not at all, where writing really fails: at a limit of the system's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import leedl_fast
from leedl_fast.training.checkpoint import KEY, read_checkpoint

resource = pytest.importorskip("resource", reason="the system has no limits of a file's size")

ROOT = Path(leedl_fast.__file__).parent.parent  # for processes that begin in other folders

# A write that would make a file larger than the limit writes as much as fits and then fails, as on
# a full disk. Python ignores the signal that comes with it.
BEGIN = """
import resource, sys
from pathlib import Path

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""

WRITERS = {
    "checkpoint": """
import torch
from leedl_fast.training.checkpoint import write_checkpoint

def write(path, number):
    write_checkpoint({"weights": torch.full((1000 * number,), number)}, path)
""",
    "grid": """
import torch
from leedl_fast.training.pictures import write_grid

def write(path, number):
    write_grid(torch.rand(number, 1, 8, 8), path, columns=1)
""",
    "maps": """
import torch
from leedl_fast.training.pictures import write_maps

def write(path, number):
    write_maps({str(layer): torch.rand(1, 2, 9, 9) for layer in range(number)}, path)
""",
    "curves": """
from leedl_fast.training.pictures import write_curves

def write(path, number):
    write_curves({str(curve): [1.0, 3.0, 2.0] for curve in range(number)}, path, "losses")
""",
    "results": """
from leedl_fast.training.results import Results

def write(path, number):
    Results(path, {"processor": "x" * 1000 * number}, {}).write()
""",
    "report": """
from leedl_fast.benchmarks.results import save

def write(path, number):
    save({"machine": "x" * 1000 * number}, path)
""",
}


def run(code, *arguments, folder):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(name, tmp_path):
    """The first file is written, the second, larger one comes to the limit."""
    path = tmp_path / "file"
    code = f"""{BEGIN}{WRITERS[name]}
path = Path(sys.argv[1])
write(path, 1)
before = path.read_bytes()
limit(len(before))
try:
    write(path, 4)
except OSError as error:
    print(error)
print(path.read_bytes() == before)
"""
    result = run(code, path, folder=tmp_path)
    assert result.stdout == f"[Errno 27] File too large: '{path}'\nTrue\n", result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


SIZES = "batch_size=2 context_length=16 num_layers=1 embed_dim=16 num_heads=2 window=4"
COMMAND = f"""{BEGIN}
from leedl_fast.cli import app

def train(*arguments):
    changes = [part for change in "{SIZES}".split() for part in ("--set", change)]
    app(["train", "gpt", *changes, "--quiet", "--output", "run", *arguments])
"""


def test_training_that_cannot_write_its_checkpoint_keeps_the_old_one(tmp_path):
    path = tmp_path / "run" / "last.ckpt"
    result = run(f"{COMMAND}train('--set', 'steps=2')", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    before = path.read_bytes()
    resume = "train('--resume', 'run/last.ckpt', '--set', 'steps=4')"
    result = run(f"{COMMAND}limit({len(before) // 2})\n{resume}", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: [Errno 27] File too large: 'run/last.ckpt'\n"
    assert path.read_bytes() == before
    assert read_checkpoint(path, "gpt")[KEY]["step"] == 2
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["last.ckpt", "log"]


def test_training_that_cannot_write_its_log_says_so(tmp_path):
    """Lightning writes it every 100 steps."""
    result = run(f"{COMMAND}limit(1000)\ntrain('--set', 'steps=200')", folder=tmp_path)
    assert result.returncode == 2
    log = "run/log/from_step_0/metrics.csv"
    assert result.stderr == f"error: [Errno 27] File too large: '{log}'\n"
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["log"]
