"""Training on Lightning: one loop for every model and backend, exact resume, Ctrl-C that loses
nothing.

A run is a function of its RunConfig: parameters, batches and dropout all follow from the seed and
the step.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from leedl_fast.backends import use_backend
from leedl_fast.training.callbacks import (
    CheckpointFile,
    Log,
    ProgressBar,
    Recorder,
    TrainResult,
    held_out,
)
from leedl_fast.training.checkpoint import KEY, read_checkpoint
from leedl_fast.training.registry import task_class
from leedl_fast.training.settings import RunConfig, changed_run
from leedl_fast.training.strategies import strategy_of
from leedl_fast.training.task import Task, lightning

CHECKPOINT_NAME = "last.ckpt"


class Batches:
    """The run's batches from step `first_step` on, without end; each process has its own."""

    def __init__(self, task: Task, first_step: int) -> None:
        self.task, self.first_step = task, first_step

    def __iter__(self) -> Iterator[Any]:
        trainer = self.task.trainer
        step = self.first_step
        while True:
            yield self.task.batch(step * trainer.world_size + trainer.global_rank)
            step += 1


def make_task(run: RunConfig) -> Task:
    """The task of a run at its start, with its data: parameters follow from the seed."""
    cls = task_class(run.task)
    data = cls.load_data(run.settings)
    torch.manual_seed(run.settings.seed)
    task = cls(run, cls.describe(data))
    task.attach(data)
    return task


def checkpoint_run(about: Mapping[str, Any]) -> RunConfig:
    """The run that a checkpoint is of, from what it says under KEY."""
    settings = task_class(about["model"]).Settings(**about["settings"])
    return RunConfig(about["model"], settings, about["model_options"])


def resumed_run(about: Mapping[str, Any], changes: Mapping[str, Any]) -> RunConfig:
    """The run of a checkpoint, to go on with; `changes` to what may change."""
    return changed_run(checkpoint_run(about), about["step"], changes)


def load_task(path: str | Path, name: str) -> Task:
    """The trained model `name` of a checkpoint, ready to sample from; it has no data."""
    checkpoint = read_checkpoint(path, name)
    about = checkpoint[KEY]
    task = task_class(name)(checkpoint_run(about), about["about"])
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"checkpoint must fit the model {name}, got {reason}") from None
    return task.eval()


def train(
    run: RunConfig,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    backend: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    quiet: bool = False,
) -> TrainResult:
    """Train a model, and evaluate it at the end.

    Args:
        run: what to compute; with `resume`, what `resumed_run` gave.
        output: folder for the checkpoint (`last.ckpt`) and the CSV log; None writes nothing.
        resume: a checkpoint to go on from.
        backend: as for `use_backend`; None leaves the choice as it is.
        accelerator, devices, strategy: Lightning's; with several devices each has batches of its
            own, and a step is one on each of them. Strategies are "auto", "ddp", with a whole model
            on every device, and "fsdp", where each keeps its share of every parameter, its gradient
            and the optimizer's state, and a layer is whole only while it runs.
        quiet: no progress bar and no lines.

    A first Ctrl-C ends the run after the step at work, with a checkpoint if there is an output; the
    result says so.
    """
    first_step = 0
    task = make_task(run)
    lightning_strategy = strategy_of(strategy, devices, task)
    if resume is not None:
        about = read_checkpoint(resume, run.task)[KEY]
        first_step = about["step"]
        if about["data_digest"] != task.data.digest:
            raise ValueError("data must be those that the checkpoint was trained on, got others")

    result = TrainResult(task, first_step)
    show_bar = not quiet and sys.stderr.isatty()
    chosen = contextlib.nullcontext() if backend is None else use_backend(backend)
    with _without_lightning_notices(), chosen:
        checkpoint_path: Path | None = None
        logger: Any = False
        if output is not None:
            folder = _output_folder(Path(output), resume)
            checkpoint_path = folder / CHECKPOINT_NAME
            logger = Log(folder, name="log", version=f"from_step_{first_step}")
        recorder = Recorder(result, run, checkpoint_path, report=not quiet and not show_bar)
        clips = task.automatic_optimization and run.settings.gradient_clip > 0
        try:
            trainer = lightning.Trainer(
                accelerator="cpu" if backend == "cpu" else accelerator,
                devices=devices,
                strategy=lightning_strategy,
                precision=run.settings.precision,
                max_epochs=-1,  # the recorder counts steps: a step may be of several optimizers
                gradient_clip_val=run.settings.gradient_clip if clips else None,
                plugins=[CheckpointFile(run.task)],
                callbacks=[recorder, ProgressBar(result)] if show_bar else [recorder],
                logger=logger,
                log_every_n_steps=1,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
        except (MisconfigurationException, TypeError) as error:  # the latter for devices=-1
            raise ValueError(
                f"accelerator, devices and strategy must be what Lightning finds here, got "
                f"{accelerator!r}, {devices} and {strategy!r}: {error}"
            ) from None
        result.rank = trainer.global_rank
        with _stop_on_interrupt(recorder):
            trainer.fit(task, Batches(task, first_step), ckpt_path=resume)
        if not result.interrupted:
            with held_out(task):
                result.metrics = task.evaluate()
            recorder.record_validation(task, result.metrics)
            if task.logger:
                task.logger.save()
    return result


def _output_folder(folder: Path, resume: str | Path | None) -> Path:
    """Created and tried now: an hour of training later is too late to find out."""
    checkpoint = folder / CHECKPOINT_NAME
    if checkpoint.exists() and (resume is None or not checkpoint.samefile(resume)):
        raise ValueError(
            f"output must not hold another run's {CHECKPOINT_NAME}, got {str(folder)!r}; "
            "resume that run or choose another folder"
        )
    probe = folder / f".{CHECKPOINT_NAME}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"output must be a writable folder, got {str(folder)!r}: {error}"
        ) from None
    return folder


@contextlib.contextmanager
def _stop_on_interrupt(recorder: Recorder) -> Iterator[None]:
    """The first SIGINT lets the step at work finish, the second one interrupts at once.

    An exception in the middle of a step could leave parameters and optimizer out of step with each
    other, and then the checkpoint written from them would not be one of this run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it receives Ctrl-C
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        recorder.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    except SystemExit:  # what Lightning makes of the second one
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _without_lightning_notices() -> Iterator[None]:
    """Lightning announces devices, tips and remarks on our loops; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            # Nothing here writes into what a layer returned.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
