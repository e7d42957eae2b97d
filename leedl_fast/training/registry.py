"""The models by name; each task's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from leedl_fast.training.settings import RunConfig, run_config

if TYPE_CHECKING:
    from leedl_fast.training.task import Task

TASKS: dict[str, str] = {
    "bert": "leedl_fast.training.tasks.bert:BERTTask",
    "gpt": "leedl_fast.training.tasks.gpt:GPTTask",
    "gan": "leedl_fast.training.tasks.gan:GANTask",
    "cyclegan": "leedl_fast.training.tasks.cyclegan:CycleGANTask",
    "autoencoder": "leedl_fast.training.tasks.autoencoder:AutoencoderTask",
    "vae": "leedl_fast.training.tasks.autoencoder:VAETask",
    "vqvae": "leedl_fast.training.tasks.autoencoder:VQVAETask",
    "transformer": "leedl_fast.training.tasks.transformer:TransformerTask",
    "tagger": "leedl_fast.training.tasks.tagger:TaggerTask",
    "sentiment": "leedl_fast.training.tasks.sentiment:SentimentTask",
    "speech": "leedl_fast.training.tasks.speech:SpeechTask",
    "speakers": "leedl_fast.training.tasks.speakers:SpeakersTask",
}


def check_name(name: str) -> None:
    if name not in TASKS:
        raise ValueError(f"model must be one of {', '.join(TASKS)}, got {name!r}")


def task_class(name: str) -> type[Task]:
    check_name(name)
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def configure(name: str, variant: str = "", /, **changes: Any) -> RunConfig:
    """A run of the model `name`: a variant of its task, with `changes` to any option."""
    task = task_class(name)
    # Every option of the model's is written down, so that a checkpoint outlives other defaults.
    options = task.default_options() | dict(task.variant(variant).changes) | changes
    return run_config(name, task.Settings, task.ModelConfig, options)
