"""One sample problem, and the inputs that it draws."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """One problem of one op.

    shapes: of the differentiable inputs, by name, in the order of the function's arguments.
    call: function(tensors, backend) -> outputs.
    scale: factor on the standard normal inputs.
    transposed: the inputs lie in memory as (batch, seqlen, heads, head_dim).
    offset: elements by which the inputs lie beyond the beginning of their memory.
    options: keyword arguments of call.
    """

    op: str
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    call: Callable[..., tuple[Tensor, ...]]
    scale: float = 1.0
    transposed: bool = False
    offset: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def tensors(self, draw: int = 0) -> dict[str, Tensor]:
        """The inputs in float64, the same at every call with the same draw."""
        generator = torch.Generator().manual_seed(draw)
        return {
            name: self.scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in self.shapes.items()
        }

    def inputs(
        self,
        rounded_to: torch.dtype,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        draw: int = 0,
    ) -> dict[str, Tensor]:
        """The inputs rounded to one dtype and kept in another, as leaves, in the case's layout."""
        return {
            name: self._laid_out(x.to(rounded_to).to(device, dtype)).requires_grad_()
            for name, x in self.tensors(draw).items()
        }

    def _laid_out(self, x: Tensor) -> Tensor:
        if self.transposed and x.dim() == 4:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.offset:  # the same numbers, not aligned to a vector
            storage = x.new_empty(x.numel() + self.offset)
            return storage[self.offset :].view(x.shape).copy_(x)
        return x

    def run(self, tensors: Tensors, backend: str | None) -> tuple[Tensor, ...]:
        return self.call(tensors, backend=backend, **self.options)
