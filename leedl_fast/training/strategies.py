"""How several devices train one model: Lightning's strategies, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from leedl_fast.training.task import Task

STRATEGIES = ("auto", "ddp", "fsdp")


def strategy_of(name: str, devices: int, task: Task) -> str | Strategy:
    """What Lightning's Trainer takes for one of STRATEGIES."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")
    if name == "fsdp":
        if task.kept_whole:
            raise ValueError(
                f"strategy must be auto or ddp for {task.name}, {task.kept_whole}, got {name!r}"
            )
        if task.settings.precision == "64-true":  # Lightning's own check names no option of ours
            raise ValueError(
                "precision must be 32-true, bf16-mixed or bf16-true with the strategy fsdp, got "
                f"{task.settings.precision!r}"
            )
        return ShardedStrategy(devices)
    if devices > 1 and not task.automatic_optimization:
        # Each optimizer's step leaves out the parameters of the other one.
        return "ddp_find_unused_parameters_true"
    return name


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2; its checkpoints are those of one device, whoever reads or wrote them."""

    def __init__(self, devices: int) -> None:
        super().__init__(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Lightning's takes the numbers that an optimizer gives its parameters, in the order of its
        groups, for those of the model's; with the groups of one device's optimizer it mixes them
        up.
        """
        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path)
        options = StateDictOptions(full_state_dict=True)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _named(state, optimizer, names)
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint


def _named(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]
) -> dict[str, Any]:
    """An optimizer's state with names for numbers."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    name_of = {
        number: names[parameter] for number, parameter in zip(numbers, parameters, strict=True)
    }
    return {
        "state": {name_of[number]: value for number, value in state["state"].items()},
        "param_groups": [
            group | {"params": [name_of[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }
