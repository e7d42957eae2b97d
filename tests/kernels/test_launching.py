"""Launches that are bound once: which are, and with what."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from leedl_fast.kernels import add_layer_norm, add_layer_norm_backward, launching
from leedl_fast.kernels.launching import Launch, Launcher
from leedl_fast.ops.add_layer_norm import Problem


class _Kernel:
    """Stands for a Triton kernel: `bound` and `again` are the arguments of either way to launch."""

    def __init__(self, compiles: bool = True) -> None:
        self.compiles = compiles
        self.bound: list[tuple] = []
        self.again: list[tuple] = []

    def __getitem__(self, grid: tuple) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.bound.append((grid, args, kwargs))
            return _Compiled(self) if self.compiles else None

        return launch


class _Compiled:
    def __init__(self, kernel: _Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        return lambda *args: self.kernel.again.append((grid, args))


def _launcher(kernel: _Kernel) -> Launcher:
    options = {"num_warps": 2}
    return Launcher(lambda rows, *_: Launch(kernel, rows, (rows, 0.5), {"BLOCK": 8}, options))


def test_the_second_launch_is_not_bound_again() -> None:
    kernel = _Kernel()
    launch = _launcher(kernel)
    x, y, z = torch.empty(3, 64)
    launch((7, True), x, None, y)
    launch((7, True), y, None, z)
    assert kernel.bound == [((7, 1, 1), (x, None, y, 7, 0.5), {"BLOCK": 8, "num_warps": 2})]
    assert kernel.again == [((7, 1, 1), (y.data_ptr(), None, z.data_ptr(), 7, 0.5, 8))]


def test_another_key_or_alignment_is_bound() -> None:
    kernel = _Kernel()
    launch = _launcher(kernel)
    x = torch.empty(64)
    for key, tensor in (((7, True), x), ((8, True), x), ((7, True), x[1:]), ((7, True), x[1:])):
        launch(key, tensor)
    assert len(kernel.bound) == 4
    assert not kernel.again


def test_the_interpreter_compiles_nothing_to_launch_again() -> None:
    kernel = _Kernel(compiles=False)
    launch = _launcher(kernel)
    for _ in range(2):
        launch((7,), torch.empty(64))
    assert len(kernel.bound) == 2


def test_bound_launches_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_MOST", 3)
    launch = _launcher(_Kernel())
    for rows in range(1, 9):
        launch((rows,), torch.empty(64))
        assert len(launch._bound) <= 3


def test_what_is_forgotten_is_bound_again() -> None:
    kernel = _Kernel()
    launch = _launcher(kernel)
    launch((7,), torch.empty(64))
    launch.forget()
    launch((7,), torch.empty(64))
    assert len(kernel.bound) == 2


@pytest.mark.parametrize("n", [64, 40000])
def test_launches_list_the_kernels_arguments_in_order(n: int) -> None:
    dtypes = (torch.float32,) * 3
    problem = Problem(64, n, *dtypes, torch.device("cpu"), 1e-5, "layer", 0.1)
    for launch, tensors in (
        (add_layer_norm._forward_launch(problem, n, n), 7),
        (add_layer_norm._dropout_launch(problem), 3),
        (add_layer_norm_backward._backward_launch(problem), 7),
        (add_layer_norm_backward._sum_launch(4, n), 4),
    ):
        names = list(inspect.signature(launch.kernel.fn).parameters)
        assert all(name.endswith("_ptr") for name in names[:tensors])
        assert len(names) == tensors + len(launch.numbers) + len(launch.constants)
        assert names[tensors + len(launch.numbers) :] == list(launch.constants)
