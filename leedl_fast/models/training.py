"""Training on Lightning: one loop for every backend, exact resume, Ctrl-C that loses nothing.

Needs the extra `leedl_fast[models]`. A run is a function of its TrainConfig: parameters, crops and
dropout all follow from the seed and the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from leedl_fast.backends import use_backend
from leedl_fast.data.text import CharacterVocabulary, load_text, random_crops, split_tokens
from leedl_fast.models.checkpoint import FORMAT, KEY, read_checkpoint, write_checkpoint
from leedl_fast.models.gpt import GPT
from leedl_fast.models.train_config import TrainConfig, gpt_config

try:
    import lightning.pytorch as lightning
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import CSVLogger
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"training needs Lightning: pip install 'leedl_fast[models]' ({error})"
    ) from error

CHECKPOINT_NAME = "last.ckpt"
NUM_VALIDATION_BATCHES = 4


@dataclass
class TrainResult:
    """What a call of `train` did: its own steps only, when it resumed."""

    first_step: int
    losses: list[float] = field(default_factory=list)  # nats per token, one per step
    step_times: list[float] = field(default_factory=list)  # seconds, forward to optimizer step
    validation_losses: dict[int, float] = field(default_factory=dict)  # by number of steps done
    checkpoint: Path | None = None
    interrupted: bool = False


class Crops:
    """The run's batches from `first_step` on, without end."""

    def __init__(self, tokens: Tensor, config: TrainConfig, first_step: int) -> None:
        self.tokens, self.config, self.first_step = tokens, config, first_step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        step = self.first_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        config = self.config
        return random_crops(
            self.tokens,
            context=config.context,
            batch_size=config.batch_size,
            seed=config.seed,
            step=step,
        )


class GPTTask(lightning.LightningModule):
    """A GPT with its optimizer, its validation crops, and what its checkpoints must remember."""

    def __init__(
        self, config: TrainConfig, vocabulary: CharacterVocabulary, text_digest: str
    ) -> None:
        super().__init__()
        self.config, self.vocabulary, self.text_digest = config, vocabulary, text_digest
        self.model = GPT(gpt_config(config, len(vocabulary)))
        self._resumed: dict[str, Any] | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.model.loss(*batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        config = self.config
        parameters = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() >= 2]},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, config.learning_rate_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @torch.no_grad()
    def validation_loss(self, crops: Crops) -> float:
        self.model.eval()
        losses = [
            self.model.loss(*(x.to(self.device) for x in crops.batch(step))).item()
            for step in range(NUM_VALIDATION_BATCHES)
        ]
        self.model.train()
        return sum(losses) / len(losses)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = {
            "format": FORMAT,
            "model": "gpt",
            "config": dataclasses.asdict(self.config),
            "vocabulary": self.vocabulary.characters,
            "text_digest": self.text_digest,
            "random_state": torch.get_rng_state(),
            "cuda_random_state": (
                torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            ),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._resumed = checkpoint[KEY]

    def on_train_start(self) -> None:
        if self._resumed is None:
            return
        torch.set_rng_state(self._resumed["random_state"])
        if self.device.type == "cuda" and self._resumed["cuda_random_state"] is not None:
            torch.cuda.set_rng_state(self._resumed["cuda_random_state"], self.device)


class CheckpointFile(CheckpointIO):
    """Lightning's checkpoints, through write_checkpoint and read_checkpoint."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path, "gpt")

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class Recorder(Callback):
    """Losses, times, validation and checkpoints, after each step; stops when `interrupted`."""

    def __init__(
        self, result: TrainResult, validation: Crops, checkpoint: Path | None, report: bool
    ) -> None:
        self.result, self.validation, self.checkpoint = result, validation, checkpoint
        self.report = report
        self.interrupted = False
        self._start = 0.0

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].item()
        self.result.step_times.append(time.perf_counter() - self._start)
        self.result.losses.append(loss)
        config, step = task.config, trainer.global_step
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss must be finite, got {loss} at step {step}; try a smaller learning rate"
            )
        is_last = step == config.steps
        if is_last or (not self.interrupted and step % config.validate_every == 0):
            self._validate(task, step, loss)
        if self.checkpoint and (is_last or self.interrupted or step % config.checkpoint_every == 0):
            trainer.save_checkpoint(self.checkpoint)
            self.result.checkpoint = self.checkpoint
        if self.interrupted:
            self.result.interrupted = not is_last
            trainer.should_stop = True

    def _validate(self, task: GPTTask, step: int, loss: float) -> None:
        validation_loss = task.validation_loss(self.validation)
        self.result.validation_losses[step] = validation_loss
        if task.logger:
            task.logger.log_metrics({"validation_loss": validation_loss}, step - 1)
        if self.report:
            print(
                f"step {step}/{task.config.steps}: loss {loss:.3f}, "
                f"validation {validation_loss:.3f}, {self.result.step_times[-1]:.3f} s per step",
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
        self.line = self.bar.add_task("", total=task.config.steps, completed=trainer.global_step)
        self.bar.start()

    def on_train_batch_end(
        self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        losses = f"loss {self.result.losses[-1]:.3f}"
        if self.result.validation_losses:
            losses += f", validation {list(self.result.validation_losses.values())[-1]:.3f}"
        self.bar.update(self.line, completed=trainer.global_step, description=losses)

    def on_train_end(self, trainer: Any, task: Any) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Any, task: Any, exception: BaseException) -> None:
        self.bar.stop()


def train(
    config: TrainConfig,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    backend: str | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train a GPT on the characters of a text.

    Args:
        config: what to compute; with `resume`, what `resumed_config` gave.
        output: folder for the checkpoint (`last.ckpt`) and the CSV log; None writes nothing.
        resume: a checkpoint to go on from.
        backend: as for `use_backend`; None leaves the choice as it is.
        quiet: no progress bar and no lines.

    A first Ctrl-C ends the run after the step at work, with a checkpoint if there is an output; the
    result says so.
    """
    text = load_text(config.data)
    vocabulary = CharacterVocabulary.from_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    first_step = 0
    if resume is not None:
        checkpoint = read_checkpoint(resume, "gpt")
        first_step = checkpoint["global_step"]
        if checkpoint[KEY]["text_digest"] != digest:
            raise ValueError(
                "data must be the text that the checkpoint was trained on, got another"
            )
    tokens = split_tokens(vocabulary.encode(text), config.context)
    torch.manual_seed(config.seed)
    task = GPTTask(config, vocabulary, digest)

    result = TrainResult(first_step)
    show_bar = not quiet and sys.stderr.isatty()
    chosen = contextlib.nullcontext() if backend is None else use_backend(backend)
    with _without_lightning_notices(), chosen:
        checkpoint_path: Path | None = None
        logger: CSVLogger | bool = False
        if output is not None:
            folder = _output_folder(Path(output), resume)
            checkpoint_path = folder / CHECKPOINT_NAME
            logger = CSVLogger(folder, name="log", version=f"from_step_{first_step}")
        recorder = Recorder(
            result,
            Crops(tokens.validation, config, 0),
            checkpoint_path,
            report=not quiet and not show_bar,
        )
        trainer = lightning.Trainer(
            accelerator="cpu" if backend == "cpu" else "auto",
            devices=1,
            max_steps=config.steps,
            gradient_clip_val=config.gradient_clip or None,
            plugins=[CheckpointFile()],
            callbacks=[recorder, ProgressBar(result)] if show_bar else [recorder],
            logger=logger,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        with _stop_on_interrupt(recorder):
            trainer.fit(task, Crops(tokens.train, config, first_step), ckpt_path=resume)
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
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
