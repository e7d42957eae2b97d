"""What a model must say so that the one training loop trains it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from leedl_fast.data.split import generator_of, shuffled_indices
from leedl_fast.training.settings import RunConfig, Settings, settable_fields
from leedl_fast.training.sharding import shard_layers

try:
    import lightning.pytorch as lightning
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"training needs Lightning: pip install 'leedl_fast[models]' ({error})"
    ) from error


@dataclass(frozen=True)
class Goal:
    """`metric` must be at least, or at most, `bar`.

    minus: a metric of another variant, "variant/metric", that is subtracted first.
    """

    metric: str
    bar: float
    direction: Literal["at least", "at most"] = "at least"
    minus: str = ""

    def value(self, metrics: Mapping[str, float], others: Mapping[str, float]) -> float:
        """What the goal is about; `others` are the metrics of all variants by "variant/metric"."""
        return metrics[self.metric] - (others[self.minus] if self.minus else 0.0)

    def reached(self, value: float) -> bool:
        return value >= self.bar if self.direction == "at least" else value <= self.bar

    def __str__(self) -> str:
        minus = f" - {self.minus}" if self.minus else ""
        return f"{self.metric}{minus} {self.direction} {self.bar:g}"


@dataclass(frozen=True)
class Variant:
    """A row of the table of models: a task with some options changed, and what it must reach."""

    name: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    goals: tuple[Goal, ...] = ()


@dataclass(frozen=True)
class SampleOptions:
    """What `leedl-fast sample` takes; a task adds fields in a subclass.

    attention_maps: a PNG file for who attends to whom in the last sample; None for none.
    """

    seed: int = 0
    attention_maps: str | None = None


class Task(lightning.LightningModule):
    """A model with its data, its loss, its optimizers and its measure.

    A subclass has the class attributes below and the methods that raise NotImplementedError here.

    name, title, shows: its name in commands, its name for people, what it shows.
    Settings, ModelConfig, SampleOptions: dataclasses; the options of `--set` are their fields.
    model_defaults: fields of ModelConfig that training has otherwise.
    data_sets: what must be fetched, unless the user has data of his own.
    data_text, own_data: what the data are, and what `--data` takes.
    variants: the first one, with the name "", is what `train` runs.
    kept_whole: why no strategy can shard its parameters, where that is so.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    shows: ClassVar[str]
    Settings: ClassVar[type[Settings]] = Settings
    ModelConfig: ClassVar[type]
    SampleOptions: ClassVar[type] = SampleOptions
    model_defaults: ClassVar[Mapping[str, Any]] = {}
    data_sets: ClassVar[tuple[str, ...]] = ()
    data_text: ClassVar[str]
    own_data: ClassVar[str] = "nothing"
    variants: ClassVar[tuple[Variant, ...]] = (Variant(),)
    kept_whole: ClassVar[str] = ""

    model: nn.Module
    averaged: nn.Module | None

    def __init__(self, run: RunConfig, about: Mapping[str, Any]) -> None:
        """about: what `describe` said of the data."""
        super().__init__()
        self.run_config, self.settings, self.about = run, run.settings, dict(about)
        self.data: Any = None
        self.model = self.build_model()
        self.averaged = None
        if self.settings.ema_decay > 0:
            self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)

    @classmethod
    def variant(cls, name: str) -> Variant:
        for variant in cls.variants:
            if variant.name == name:
                return variant
        names = ", ".join(variant.name for variant in cls.variants if variant.name)
        raise ValueError(f"variant of {cls.name} must be one of {names or 'none'}, got {name!r}")

    @classmethod
    def default_options(cls) -> dict[str, Any]:
        """Every option that `--set` may change, with its default."""
        options = {}
        for config in (cls.Settings, cls.ModelConfig):
            for name, option in settable_fields(config).items():
                options[name] = (
                    option.default
                    if option.default_factory is dataclasses.MISSING
                    else option.default_factory()
                )
        return options | dict(cls.model_defaults)

    @classmethod
    def load_data(cls, settings: Any) -> Any:
        """The data: any object with a text `digest`. settings.data is the user's, if not None."""
        raise NotImplementedError

    @classmethod
    def describe(cls, data: Any) -> dict[str, Any]:
        """What the model and its samples need to know of the data: numbers, texts, lists, tensors.
        Checkpoints hold it.
        """
        return {}

    def build_model(self) -> nn.Module:
        """From self.settings, self.model_config(...) and self.about; there are no data yet."""
        raise NotImplementedError

    def model_config(self, **from_data: Any) -> Any:
        """The model's config: what the data determine, the rest from the run's options."""
        return self.ModelConfig(**self.run_config.model, **from_data)

    def attach(self, data: Any) -> None:
        """Before training or evaluation: make of the data what `batch` and `evaluate` need."""
        self.data = data

    def batch(self, index: int) -> Any:
        """Batch number `index` to train on: a function of the seed and the index alone."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """The loss to minimise, alone or as "loss" among others to log."""
        raise NotImplementedError

    def outputs(self, batch: Any) -> Tensor:
        """What the model computes for a batch, for comparing backends."""
        return self.losses(batch)["loss"]

    def evaluate(self) -> dict[str, float]:
        """How well `inference_model` does on held-out data."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """The same, cheaper: how training goes."""
        return self.evaluate()

    def sample(self, options: Any, output: Path | None) -> Iterator[str]:
        """Texts to print, as they come; pictures are written to the folder `output`."""
        raise NotImplementedError

    @property
    def inference_model(self) -> Any:
        return self.model if self.averaged is None else self.averaged

    def losses(self, batch: Any) -> dict[str, Tensor]:
        loss = self.loss(batch)
        return loss if isinstance(loss, dict) else {"loss": loss}

    def shuffled(self, num_examples: int, index: int) -> Tensor:
        """Which examples batch `index` has, int64 (batch_size,)."""
        settings = self.settings
        return shuffled_indices(num_examples, settings.batch_size, seed=settings.seed, index=index)

    def generator(self, index: int) -> torch.Generator:
        """The random numbers of batch `index`."""
        return generator_of(self.settings.seed, index)

    def configure_model(self) -> None:
        """Lightning's hook; with a strategy that shards parameters there is a mesh of devices."""
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        if self.automatic_optimization:
            # A loss with gradients in it, as a penalty has them, would find its layers freed.
            shard_layers(self, mesh)
        if self.averaged is not None:
            fully_shard(self.averaged, mesh=mesh)  # apart: training does not gather it
        fully_shard(self, mesh=mesh)

    def forward(self, loss_of: Callable[[], Any]) -> Any:
        """A loss of training; what a strategy shards is whole from here to the end of backward."""
        return loss_of()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(lambda: self.losses(batch))

    def configure_optimizers(self) -> Any:
        """AdamW that does not decay vectors, with warm-up and cosine."""
        settings = self.settings
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() >= 2]},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            # Under autocast Lightning refuses to clip the gradients of fused optimizers.
            fused=settings.precision != "bf16-mixed",
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.learning_rate_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """After `step` steps; at first the average follows closely, it began at random weights."""
        if self.averaged is None:
            return
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        for mean, value in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
        for kept, new in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
            kept.copy_(new)
