"""Training with two optimizers that take turns: discriminators and generators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from leedl_fast.training.task import Task

Side = Literal["discriminator", "generator"]
SIDES: tuple[Side, ...] = ("discriminator", "generator")


class AdversarialTask(Task):
    """A model whose parameters' names begin with "discriminator" or "generator".

    A subclass's training_step calls `step` for each side, then `finish_step`. betas: of Adam.
    """

    automatic_optimization = False
    betas: ClassVar[tuple[float, float]]

    def parameters_of(self, side: Side) -> list[nn.Parameter]:
        named = self.model.named_parameters()
        return [parameter for name, parameter in named if name.startswith(side)]

    def configure_optimizers(self) -> Any:
        settings = self.settings
        optimizers = [
            torch.optim.AdamW(
                self.parameters_of(side),
                lr=settings.learning_rate,
                betas=self.betas,
                weight_decay=settings.weight_decay,
            )
            for side in SIDES
        ]
        return optimizers, [
            torch.optim.lr_scheduler.LambdaLR(optimizer, settings.learning_rate_factor)
            for optimizer in optimizers
        ]

    def step(self, side: Side, loss_of_side: Callable[[], Tensor]) -> Tensor:
        """One step of one side's optimizer; the other side's parameters need no gradient."""
        optimizer = cast(Any, self.optimizers())[SIDES.index(side)]
        self.toggle_optimizer(optimizer)
        loss = self(loss_of_side)
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.settings.gradient_clip > 0:
            self.clip_gradients(optimizer, self.settings.gradient_clip, "norm")
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        return loss.detach()

    def finish_step(self, discriminator_loss: Tensor, generator_loss: Tensor) -> dict[str, Tensor]:
        """The learning rates of the next step; returns what training_step returns."""
        for scheduler in cast(Any, self.lr_schedulers()):
            scheduler.step()
        return {
            "loss": discriminator_loss + generator_loss,
            "discriminator_loss": discriminator_loss,
            "generator_loss": generator_loss,
        }
