"""Lightning's DDP with two processes on one CPU, and the strategies that are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import leedl_fast
from leedl_fast.training.checkpoint import KEY, read_checkpoint
from leedl_fast.training.engine import checkpoint_run, make_task, train
from leedl_fast.training.registry import configure

ROOT = Path(leedl_fast.__file__).parent.parent

OPTIONS = (
    "steps=4 batch_size=2 context_length=16 num_layers=1 embed_dim=16 num_heads=2 window=4 "
    "warmup_steps=2"
)


def train_on_two(name, options, folder):
    """What the command prints."""
    changes = [part for option in options.split() for part in ("--set", option)]
    devices = ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
    process = subprocess.run(
        [sys.executable, "-m", "leedl_fast.cli", "train", name, *changes, *devices],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_two_processes_train_as_one_with_both_batches(tmp_path):
    """Each step has the mean gradient of two batches; one process reports, in one folder."""
    output = train_on_two("gpt", OPTIONS, tmp_path)
    assert output.count("4 steps: loss ") == 1
    assert output.count("step 4/4: loss ") == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["gpt-1"]

    checkpoint = read_checkpoint(tmp_path / "runs/gpt-1/last.ckpt", "gpt")
    run = checkpoint_run(checkpoint[KEY])
    task = make_task(run)
    before = [parameter.detach().clone() for parameter in task.parameters()]
    setup = task.configure_optimizers()
    optimizer, scheduler = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    for step in range(run.settings.steps):
        optimizer.zero_grad()
        losses = [task.loss(task.batch(2 * step + rank)) for rank in range(2)]
        (sum(losses) / 2).backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), run.settings.gradient_clip)
        optimizer.step()
        scheduler.step()
    for (name, value), old in zip(task.named_parameters(), before, strict=True):
        torch.testing.assert_close(checkpoint["state_dict"][name], value.data, atol=2e-5, rtol=0)
        assert (value - old).abs().max() > 1e-3, name


def test_two_optimizers_take_turns_on_two_processes(tmp_path):
    sizes = "steps=2 batch_size=4 num_layers=1 embed_dim=16 num_heads=2"
    output = train_on_two("gan", sizes, tmp_path)
    assert output.count("2 steps: loss ") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fsdp"}, "strategy must be one of auto, ddp, which .* got 'fsdp'"),
        ({"devices": 0}, r"accelerator, devices and strategy must be .* got 'auto', 0 and 'auto'"),
    ],
)
def test_devices_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        train(configure("gpt"), quiet=True, **options)
