"""`verify`: a model's own batch through plain PyTorch, the fused kernels, and float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from leedl_fast.integrations.patching import patch

DRAWS = 4  # of the outputs' weights: the error of few numbers is a matter of luck


@dataclass(frozen=True)
class Verification:
    """Of one output or gradient: root mean square errors against float64, and what ours may be."""

    name: str
    error: float
    plain_error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed


def verify(model: nn.Module, batch: Any) -> list[Verification]:
    """Compare a model with fused kernels with itself without, on a batch of yours.

    Copies of `model` run in evaluation mode, so that no dropout hides a difference: as it is, with
    `patch`, and in float64. A patched model may be at most twice as far from float64 as the plain
    one, plus one ulp; `holds` says whether it is. `model` is not changed.

    Args:
        model: one that has not been patched yet.
        batch: what the model takes: a mapping of keyword arguments, a tuple or list of positional
            ones, or one argument.

    Returns:
        A line for every floating-point output, and for the gradient of every parameter and of
        every floating-point tensor in the batch, of four random sums of the outputs.

    Raises:
        ValueError: nothing in the model has a fused kernel, or it gives no floating-point output.
    """
    plain = copy.deepcopy(model).eval()
    patched, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    if not patch(patched).replaced:
        raise ValueError(f"model must have something to patch, got a {type(model).__name__}")
    expected = _results(exact, batch, torch.float64)
    others = _results(plain, batch, None)
    lines = []
    for name, ours in _results(patched, batch, None).items():
        plain_error = _rms(others[name] - expected[name])
        ulp = torch.finfo(ours.dtype).eps * _rms(expected[name])
        lines.append(
            Verification(name, _rms(ours - expected[name]), plain_error, 2 * plain_error + ulp)
        )
    return lines


def _rms(x: Tensor) -> float:
    """Not a number is infinite."""
    return x.double().square().mean().sqrt().nan_to_num(nan=torch.inf).item() if x.numel() else 0.0


def _results(model: nn.Module, batch: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Outputs and gradients by name; the batch's floating-point tensors in `dtype`."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x.clone()
        return x.detach().to(dtype or x.dtype, copy=True).requires_grad_()

    batch = tree_map(leaf, batch)
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    if isinstance(output, Mapping):  # of whatever class: a plain one has names for its entries
        output = dict(output)
    outputs = {
        f"output{keystr(path)}": x
        for path, x in tree_flatten_with_path(output)[0]
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    if not outputs:
        raise ValueError("model must return a floating-point tensor, got none")
    inputs = {
        f"batch{keystr(path)}": x
        for path, x in tree_flatten_with_path(batch)[0]
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    inputs |= {name: x for name, x in model.named_parameters() if x.requires_grad}
    results = {name: x.detach() for name, x in outputs.items()}
    generator = torch.Generator().manual_seed(0)
    differentiable = [x for x in outputs.values() if x.requires_grad]
    draws = []
    for _ in range(DRAWS):
        weights = [torch.randn(x.shape, generator=generator).to(x) for x in differentiable]
        draws.append(
            torch.autograd.grad(
                differentiable, list(inputs.values()), weights, retain_graph=True, allow_unused=True
            )
        )
    for name, *gradients in zip(inputs, *draws, strict=True):
        if gradients[0] is not None:
            results[f"gradient of {name}"] = torch.stack(gradients)
    return results
