"""No launcher waits for its device or copies between it and the host, so that a CUDA graph can
capture every op, once it has run before.

Tensors on "meta" have no values: whatever reads one fails, and kernels are recorded instead of run.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from leedl_fast.backends import triton
from leedl_fast.ops import (
    add_layer_norm,
    attention,
    diffusion,
    linear_cross_entropy,
    scaled_dot_product_attention,
)
from leedl_fast.testing.samples import ATTENTION_EXTRAS, CASES, Case

META = torch.device("meta")
# What makes a tensor of Python's numbers copies them from the host.
FROM_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray)
OF_SAMPLES = "leedl_fast.testing.samples"


class Synchronises(Exception):
    pass


def _caller() -> str:
    """The innermost place in the package that is on the stack."""
    frame: Any = sys._getframe(2)
    while not frame.f_globals.get("__name__", "").startswith("leedl_fast."):
        frame = frame.f_back
        if frame is None:
            return __name__
    return f"{frame.f_globals['__name__']}:{frame.f_lineno}"


class _NoNumbersFromTheHost(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in FROM_HOST and not _caller().startswith(OF_SAMPLES):
            raise Synchronises(f"{function.__name__} at {_caller()}")
        return function(*args, **(kwargs or {}))


class _NoCopies(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        # Numbers on the host may become arguments of a kernel; nothing else may cross.
        devices = {x.device for x in (*given, *made) if x.dim() > 0 or x.device == META}
        if len(devices) > 1 and not _caller().startswith(OF_SAMPLES):
            raise Synchronises(f"{function} at {_caller()}")
        return result


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that would have run."""
    names: list[str] = []

    def run(self: JITFunction, *args: Any, grid: Any, **kwargs: Any) -> None:
        assert all(isinstance(size, int) and size > 0 for size in grid)
        names.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton, "is_interpreted", lambda: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # it knows no "meta"
    return names


def _run_twice(run: Callable[[], object]) -> None:
    """The first time may fill tables and caches."""
    run()
    with _NoNumbersFromTheHost(), _NoCopies():
        run()


def _with_gradients(run: Callable[..., Any], *leaves: Tensor) -> Callable[[], object]:
    def both() -> object:
        outputs = run()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        douts = [torch.empty_like(output) for output in outputs]
        return torch.autograd.grad(outputs, leaves, douts, allow_unused=True)

    return both


TAKEN = [case for case in dict.fromkeys((*CASES, *ATTENTION_EXTRAS)) if case.op in triton.TABLE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_samples(case: Case, dtype: torch.dtype, launched: list[str]) -> None:
    tensors = case.inputs(dtype, dtype, META)
    run = _with_gradients(lambda: case.run(tensors, "triton"), *tensors.values())
    _run_twice(run)
    assert launched or not all(x.numel() for x in tensors.values())


def _leaves(count: int, *shape: int) -> list[Tensor]:
    return [torch.empty(shape, device=META, requires_grad=True) for _ in range(count)]


SEEDS = {
    "none": lambda: None,
    "int": lambda: -3,
    "tensor": lambda: torch.empty(1, dtype=torch.int64, device=META),
}


@pytest.mark.parametrize("kind", SEEDS)
def test_dropout_with_seeds_of_every_kind(kind: str, launched: list[str]) -> None:
    options = {"dropout_p": 0.2, "seed": SEEDS[kind](), "backend": "triton"}
    q, k, v = _leaves(3, 2, 2, 33, 16)
    _run_twice(_with_gradients(lambda: attention(q, k, v, **options), q, k, v))
    x, residual = _leaves(2, 9, 20)
    _run_twice(_with_gradients(lambda: add_layer_norm(x, residual, **options), x, residual))
    assert "_forward_kernel" in launched
    assert "_dropout_kernel" in launched


def test_masks_and_steps_by_tensors(launched: list[str]) -> None:
    """What samples give as Python's numbers, given as tensors."""
    q, k, v = _leaves(3, 2, 2, 33, 16)
    mask = torch.empty(33, 33, dtype=torch.bool, device=META)

    def masked() -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    x, y = _leaves(2, 3, 8)
    timesteps = torch.empty(3, dtype=torch.int64, device=META)
    schedule = diffusion.NoiseSchedule.linear(10)
    options = {"seed": torch.empty(3, dtype=torch.int64, device=META), "backend": "triton"}

    def sampled() -> tuple[Tensor, ...]:
        step = diffusion.ddim_step(
            x, timesteps, y, schedule, prev_timesteps=timesteps, eta=0.5, **options
        )
        loss = diffusion.noise_prediction_loss(x, y, timesteps, schedule, **options)
        noise = diffusion.randn((3, 8), device=META, **options)
        return step + noise, loss

    for run in (_with_gradients(sampled, x, y), _with_gradients(masked, q, k, v)):
        launched.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("leedl_fast.backends._active", "triton")
            _run_twice(run)
        assert launched


@pytest.mark.parametrize(
    "violate",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.tensor([1.0], device=x.device),
    ],
)
def test_what_would_wait_is_seen(violate: Callable[[Tensor], object]) -> None:
    x = torch.empty(3, device=META)
    with pytest.raises((Synchronises, RuntimeError, NotImplementedError)):
        _run_twice(lambda: violate(x))


def test_cross_entropy_takes_any_number_of_ignored_rows(launched: list[str]) -> None:
    hidden, weight = *_leaves(1, 9, 8), *_leaves(1, 5, 8)
    targets = torch.empty(9, dtype=torch.int64, device=META)
    _run_twice(
        _with_gradients(
            lambda: linear_cross_entropy(hidden, weight, targets, backend="triton"), hidden, weight
        )
    )
    assert "_loss_kernel" in launched
