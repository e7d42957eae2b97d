"""`leedl-fast compare`: what it finds equal, what it finds different, and what it writes."""

import dataclasses
import json
from math import nan
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from leedl_fast.cli import app
from leedl_fast.training import compare as compare_module
from leedl_fast.training.compare import CURVE_TOLERANCE, TOLERANCE, Side, compare_backends
from leedl_fast.training.registry import configure

SIZES = {"batch_size": 4, "context_length": 32, "num_layers": 2, "embed_dim": 32, "num_heads": 4}
SMALL = {**SIZES, "window": 8, "dropout": 0.1, "warmup_steps": 2}


@pytest.fixture
def command(tmp_path):
    def run(*arguments):
        changes = [part for pair in SMALL.items() for part in ("--set", "{}={}".format(*pair))]
        arguments = ["compare", "gpt", *changes, "--steps", 4, *arguments]
        environment = {"COLUMNS": "200", "NO_COLOR": "1"}
        return CliRunner(env=environment).invoke(app, list(map(str, arguments)))

    return run


def test_eager_and_fused_agree():
    """Far within what the command allows: float32 sums in another order."""
    comparison = compare_backends(configure("gpt", **SMALL, steps=4), "cpu")
    assert comparison.agrees
    assert comparison.outputs < 2e-5
    assert comparison.gradients < 2e-5
    assert comparison.curve < 1e-4
    eager, fast = comparison.sides["eager"], comparison.sides["cpu"]
    assert eager.outputs.shape[:2] == (4, 32)
    assert eager.gradients.keys() == fast.gradients.keys()
    assert len(eager.gradients) > 10
    assert all(gradient.abs().max() > 0 for gradient in eager.gradients.values())
    assert len(eager.losses) == len(fast.losses) == 4
    assert eager.step_time > 0


def test_the_memory_of_a_step_holds_its_gradients(monkeypatch):
    trained = SimpleNamespace(interrupted=False, losses=[1.0], step_times=[1.0])
    monkeypatch.setattr(compare_module, "train", lambda *arguments, **options: trained)
    sizes = {"num_layers": 1, "embed_dim": 512, "num_heads": 8, "batch_size": 1}
    comparison = compare_backends(configure("gpt", **SMALL | sizes), "cpu")
    for name, side in comparison.sides.items():
        if side.memory is None:
            pytest.skip("this system does not say what memory was used")
        gradients = sum(gradient.nbytes for gradient in side.gradients.values())
        assert gradients < side.memory < 2 * gradients, name


def test_the_table_the_plot_and_the_numbers(command, tmp_path):
    result = command("--output", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'plot.png'} and {tmp_path / 'plot.json'}" in result.stdout
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in result.stdout.splitlines()
        if len(cells := line.split("│")) == 7
    }
    numbers = json.loads((tmp_path / "plot.json").read_text())
    assert numbers["agrees"]
    assert numbers["options"]["context_length"] == 32
    for name, allowed in (("outputs", TOLERANCE), ("gradients", TOLERANCE)):
        difference = numbers["differences"][name]
        assert difference["allowed"] == allowed
        assert rows[name] == ["", "", f"{difference['got']:.1e}", f"{allowed:.0e}"]
    losses = [numbers["backends"][name]["losses"] for name in ("eager", "cpu")]
    assert rows["first loss"][:2] == [f"{side[0]:.5f}" for side in losses]
    assert rows["last loss"][:2] == [f"{side[-1]:.5f}" for side in losses]
    assert rows["last loss"][3] == f"{CURVE_TOLERANCE:.0e}"
    assert all(cell.endswith(" ms") for cell in rows["time per step"][:2])
    assert "memory per step" in rows
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (1050, 600)


@pytest.fixture
def sides(monkeypatch):
    """Two equal sides without any training, to change one of them."""
    generator = torch.Generator().manual_seed(0)
    outputs, weight = torch.randn(2, 3, 4, generator=generator)
    side = Side(outputs, {"weight": weight, "bias": weight[0]}, [3.0, 2.0, 1.5], 0.01, None)
    made = {"eager": side, "cpu": dataclasses.replace(side, step_time=0.005)}
    monkeypatch.setattr(compare_module, "_side", lambda run, backend: made[backend])
    return made


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("outputs", lambda side: {"outputs": side.outputs * 1.01}),
        ("losses", lambda side: {"losses": [*side.losses[:-1], 1.6]}),
        ("gradients", lambda side: {"gradients": side.gradients | {"bias": torch.zeros(4)}}),
        ("gradients", lambda side: {"gradients": {"weight": side.gradients["weight"]}}),
        ("gradients", lambda side: {"gradients": side.gradients | {"bias": torch.full((4,), nan)}}),
        ("outputs", lambda side: {"outputs": side.outputs * nan}),
    ],
)
def test_what_differs_is_exit_code_1(command, sides, tmp_path, what, changes):
    result = command("--output", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    assert "2.00 times less" in result.stdout
    assert "unknown" in result.stdout  # the memory
    sides["cpu"] = dataclasses.replace(sides["cpu"], **changes(sides["cpu"]))
    result = command("--output", tmp_path / "plot.png")
    assert result.exit_code == 1
    numbers = json.loads((tmp_path / "plot.json").read_text())
    assert not numbers["agrees"]
    beyond = {
        name
        for name, row in numbers["differences"].items()
        if row["got"] is None or row["got"] > row["allowed"]
    }
    assert beyond == {what}


def test_a_difference_is_relative_to_the_largest_value():
    difference = compare_module._difference
    assert difference(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0])) == 0.25
    assert difference(torch.zeros(2), torch.zeros(2)) == 0.0
    assert difference(torch.zeros(2), torch.full((2,), 1e-9)) == pytest.approx(1e-3)


def test_bad_arguments(command, tmp_path):
    for arguments, message in (
        (["--backend", "tpu"], "backend must be one of"),
        (["--backend", "eager"], "backend must be another one than eager"),
        (["--output", tmp_path], f"got '{tmp_path}', which is a folder"),
        (["--output", tmp_path / "plot.json"], "output must be a picture, got"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
