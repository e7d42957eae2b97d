"""What happens around each step of training: records, checkpoints, the progress bar."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from leedl_fast.training.checkpoint import FORMAT, KEY, read_checkpoint, write_checkpoint
from leedl_fast.training.settings import RunConfig
from leedl_fast.training.sharding import whole
from leedl_fast.training.task import Task, lightning


@dataclass
class TrainResult:
    """What a call of `train` did: its own steps only, when it resumed."""

    task: Task
    first_step: int
    losses: list[float] = field(default_factory=list)  # one per step
    step_times: list[float] = field(default_factory=list)  # seconds, forward to optimizer step
    validation: dict[int, dict[str, float]] = field(default_factory=dict)  # by steps done
    metrics: dict[str, float] = field(default_factory=dict)  # of the finished run
    checkpoint: Path | None = None
    interrupted: bool = False
    rank: int = 0  # of this process among those of several devices

    @property
    def steps_done(self) -> int:
        return self.first_step + len(self.losses)


@contextlib.contextmanager
def held_out(task: Task) -> Iterator[None]:
    """To evaluate and to sample: no dropout, no gradients, random numbers apart from training's.

    Weights of another dtype are float32 meanwhile, as the held-out data are, and sharded ones are
    whole.
    """
    devices = [task.device] if task.device.type == "cuda" else []
    apart = torch.random.fork_rng(devices=devices)
    with apart, torch.no_grad(), whole(task), _in_float32(task):
        torch.manual_seed(task.settings.seed)
        task.model.eval()
        try:
            yield
        finally:
            task.model.train()


@contextlib.contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Meanwhile copies stand for the parameters and buffers of another floating dtype.

    A parameter whose own data changed their dtype would lose the hook by which DDP learns of its
    gradient, and no longer be averaged.
    """
    replaced: list[tuple[nn.Module, str, Tensor]] = []
    copies: dict[Tensor, Tensor] = {}  # one of each, so that tied weights stay tied
    for part in module.modules():
        for tensors in (part.named_parameters, part.named_buffers):
            for name, tensor in tensors(recurse=False, remove_duplicate=False):
                if tensor.is_floating_point() and tensor.dtype != torch.float32:
                    replaced.append((part, name, tensor))
    for part, name, tensor in replaced:
        if tensor not in copies:
            copy = tensor.detach().float()
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[tensor] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
        setattr(part, name, copies[tensor])
    try:
        yield
    finally:
        for part, name, tensor in replaced:
            setattr(part, name, tensor)


class CheckpointFile(CheckpointIO):
    """Lightning's checkpoints, through write_checkpoint and read_checkpoint."""

    def __init__(self, model: str) -> None:
        self.model = model

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path, self.model)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class Log(lightning.loggers.CSVLogger):
    """Lightning's log, whose errors name the file."""

    def save(self) -> None:
        try:
            super().save()
        except OSError as error:
            path = self.experiment.metrics_file_path
            raise OSError(error.errno, error.strerror, path) from error


class Recorder(Callback):
    """Losses, times, validation and checkpoints, after each step; stops when `interrupted`."""

    def __init__(
        self, result: TrainResult, run: RunConfig, checkpoint: Path | None, report: bool
    ) -> None:
        self.result, self.run, self.checkpoint, self.report = result, run, checkpoint, report
        self.interrupted = False
        self._resumed: dict[str, Any] | None = None
        self._start = 0.0

    def on_save_checkpoint(self, trainer: Any, task: Any, checkpoint: dict[str, Any]) -> None:
        on_cuda = task.device.type == "cuda"
        checkpoint[KEY] = {
            "format": FORMAT,
            "model": self.run.task,
            "settings": vars(self.run.settings).copy(),
            "model_options": dict(self.run.model),
            "about": task.about,
            "data_digest": task.data.digest,
            "step": self.result.steps_done,
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state(task.device) if on_cuda else None,
        }

    def on_load_checkpoint(self, trainer: Any, task: Any, checkpoint: dict[str, Any]) -> None:
        self._resumed = checkpoint[KEY]

    def on_train_start(self, trainer: Any, task: Any) -> None:
        if self._resumed is None:
            return
        torch.set_rng_state(self._resumed["random_state"])
        if task.device.type == "cuda" and self._resumed["cuda_random_state"] is not None:
            torch.cuda.set_rng_state(self._resumed["cuda_random_state"], task.device)

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        result, settings = self.result, self.run.settings
        values = {name: value.detach().item() for name, value in outputs.items()}
        result.step_times.append(time.perf_counter() - self._start)
        result.losses.append(values["loss"])
        step = result.steps_done
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        for name, value in bad.items():
            raise FloatingPointError(
                f"the {name} must be finite, got {value} at step {step}; "
                "try a smaller learning rate"
            )
        task.update_average(step)
        if task.logger:
            task.logger.log_metrics(values, step - 1)
        is_last = step == settings.steps
        # Ctrl-C reaches several processes at different steps: all stop after the same one.
        interrupted = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        if not is_last and not interrupted and step % settings.validate_every == 0:
            with held_out(task):
                self.record_validation(task, task.validate())
        if self.checkpoint and (is_last or interrupted or step % settings.checkpoint_every == 0):
            trainer.save_checkpoint(self.checkpoint)
            result.checkpoint = self.checkpoint
        if is_last or interrupted:
            result.interrupted = not is_last
            trainer.should_stop = True

    def record_validation(self, task: Task, metrics: dict[str, float]) -> None:
        result, step = self.result, self.result.steps_done
        result.validation[step] = metrics
        if task.logger:
            task.logger.log_metrics(metrics, step - 1)
        if self.report and result.rank == 0:
            values = "".join(f"{name} {value:.3f}, " for name, value in metrics.items())
            print(
                f"step {step}/{self.run.settings.steps}: loss {result.losses[-1]:.3f}, {values}"
                f"{result.step_times[-1]:.3f} s per step",
                flush=True,
            )


class ProgressBar(Callback):
    """One bar for the whole run, on stderr; Lightning's own count batches of epochs."""

    def __init__(self, result: TrainResult) -> None:
        self.result = result
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )

    def on_train_start(self, trainer: Any, task: Any) -> None:
        total, done = task.settings.steps, self.result.first_step
        self.line = self.bar.add_task("", total=total, completed=done)
        if trainer.is_global_zero:
            self.bar.start()

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        values = [f"loss {self.result.losses[-1]:.3f}"]
        if self.result.validation:
            newest = list(self.result.validation.values())[-1]
            values += [f"{name} {value:.3f}" for name, value in newest.items()]
        self.bar.update(self.line, completed=self.result.steps_done, description=", ".join(values))

    def on_train_end(self, trainer: Any, task: Any) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Any, task: Any, exception: BaseException) -> None:
        self.bar.stop()
