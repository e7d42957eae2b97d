"""Lightning's DDP and FSDP2 with two processes on one CPU, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import leedl_fast
from leedl_fast.training.checkpoint import KEY, read_checkpoint
from leedl_fast.training.engine import checkpoint_run, load_task, make_task, resumed_run, train
from leedl_fast.training.registry import configure, task_class
from leedl_fast.training.settings import parse_changes

ROOT = Path(leedl_fast.__file__).parent.parent

OPTIONS = (
    "steps=4 batch_size=2 context_length=16 num_layers=2 embed_dim=16 num_heads=2 window=4 "
    "warmup_steps=2 ema_decay=0.9 data=text.txt"
)


@pytest.fixture
def folder(tmp_path):
    """With a text and pairs of texts to train on."""
    (tmp_path / "text.txt").write_text(" ".join(f"The binary of {i} is {i:b}." for i in range(300)))
    pairs = [f"number {i},Zahl {i:b}" for i in range(200)]
    (tmp_path / "pairs.csv").write_text("\n".join(["source,target", *pairs]))
    return tmp_path


def run_on_two(arguments, folder):
    """What Python prints, given these arguments; Lightning starts the second process."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def train_on_two(name, options, folder, strategy, *more):
    changes = [part for option in options.split() for part in ("--set", option)]
    devices = ["--accelerator", "cpu", "--devices", 2, "--strategy", strategy]
    return run_on_two(["-m", "leedl_fast.cli", "train", name, *changes, *devices, *more], folder)


class OneProcess:
    """What each process of several does, one after another in one loop of plain PyTorch."""

    def __init__(self, run, checkpoint=None):
        self.run, self.task = run, make_task(run)
        setup = self.task.configure_optimizers()
        self.optimizer, self.scheduler = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
        if checkpoint is not None:
            self.task.load_state_dict(checkpoint["state_dict"])
            self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
            self.scheduler.load_state_dict(checkpoint["lr_schedulers"][0])

    def train(self, steps, num_processes=2):
        """The mean losses."""
        history = []
        for step in steps:
            self.optimizer.zero_grad()
            batches = [
                self.task.batch(num_processes * step + rank) for rank in range(num_processes)
            ]
            loss = sum(self.task.loss(batch) for batch in batches) / num_processes
            loss.backward()
            parameters = self.task.parameters()
            torch.nn.utils.clip_grad_norm_(parameters, self.run.settings.gradient_clip)
            self.optimizer.step()
            self.scheduler.step()
            self.task.update_average(step + 1)
            history.append(loss.item())
        return history

    def checkpoint(self):
        return {
            "state_dict": self.task.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "lr_schedulers": [self.scheduler.state_dict()],
        }


def assert_same(checkpoint, expected):
    """Parameters by name, their optimizer's state by its place in the groups."""
    assert checkpoint["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(checkpoint["state_dict"][name], value, atol=2e-5, rtol=0)
    states, wanted = (
        [
            [holder["state"][number] for number in group["params"]]
            for holder in c["optimizer_states"]
            for group in holder["param_groups"]
        ]
        for c in (checkpoint, expected)
    )
    torch.testing.assert_close(states, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_both_batches(folder, strategy, monkeypatch):
    """Each step has the mean gradient of two batches; one process reports, in one folder."""
    monkeypatch.chdir(folder)
    output = train_on_two("gpt", OPTIONS, folder, strategy)
    assert output.count("4 steps: loss ") == 1
    assert output.count("step 4/4: loss ") == 1
    assert [path.name for path in (folder / "runs").iterdir()] == ["gpt-1"]
    path = folder / "runs/gpt-1/last.ckpt"
    assert {file.name for file in path.parent.iterdir()} == {"last.ckpt", "log"}

    checkpoint = read_checkpoint(path, "gpt")
    one = OneProcess(checkpoint_run(checkpoint[KEY]))
    before = [parameter.detach().clone() for parameter in one.task.parameters()]
    one.train(range(4))
    assert_same(checkpoint, one.checkpoint())
    for (name, value), old in zip(one.task.named_parameters(), before, strict=True):
        assert (value - old).abs().max() > 1e-3, name


def test_a_run_goes_on_sharded_and_then_whole(folder, monkeypatch):
    """From one device to two that share its parameters, and back to one."""
    monkeypatch.chdir(folder)
    task = task_class("gpt")
    options = parse_changes(OPTIONS.split(), task.Settings, task.ModelConfig)
    run = configure("gpt", **options | {"steps": 2})
    start = train(run, output=folder / "run", quiet=True)
    checkpoint = read_checkpoint(start.checkpoint, "gpt")
    train_on_two("gpt", "steps=4", folder, "fsdp", "--resume", start.checkpoint, "--quiet")
    one = OneProcess(resumed_run(checkpoint[KEY], {"steps": 4}), checkpoint)
    one.train(range(2, 4))
    checkpoint = read_checkpoint(start.checkpoint, "gpt")
    assert_same(checkpoint, one.checkpoint())

    task = load_task(start.checkpoint, "gpt")
    options = task.SampleOptions(prompt="be", tokens=5)
    assert len("".join(task.sample(options, None))) == len("be") + 5

    run = resumed_run(checkpoint[KEY], {"steps": 6})
    end = train(run, resume=start.checkpoint, quiet=True)
    losses = OneProcess(run, one.checkpoint()).train(range(4, 6), num_processes=1)
    assert end.losses == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize(
    "name", ["shares", "interrupted", "precisions", "adversaries", "layers", "codebook"]
)
def test_sharded_runs(folder, name):
    """See there."""
    run_on_two([Path(__file__).parent / "sharded_runs.py", name, folder], folder)


def test_two_optimizers_take_turns_on_two_processes(tmp_path):
    sizes = "steps=2 batch_size=4 num_layers=1 embed_dim=16 num_heads=2"
    output = train_on_two("gan", sizes, tmp_path, "ddp")
    assert output.count("2 steps: loss ") == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt", {"strategy": "deepspeed"}, "strategy must be one of auto, ddp, fsdp, got 'deepsp"),
        ("gpt", {"devices": 0}, r"accelerator, devices and .* got 'auto', 0 and 'auto'"),
        ("gpt", {"devices": -1}, r"accelerator, devices and .* got 'auto', -1 and 'auto'"),
        ("gpt", {"devices": 0, "strategy": "fsdp"}, r"accelerator, devices and .* 0 and 'fsdp'"),
        ("vqvae", {"strategy": "fsdp"}, "must be auto or ddp for vqvae, whose codebook .* 'fsdp'"),
    ],
)
def test_devices_that_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        train(configure(name), quiet=True, **options)


def test_a_precision_that_cannot_be_sharded():
    message = "precision must be 32-true, bf16-mixed or bf16-true .* fsdp, got '64-true'"
    with pytest.raises(ValueError, match=message):
        train(configure("gpt", precision="64-true"), quiet=True, strategy="fsdp")
