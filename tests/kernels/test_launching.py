"""Launches that are bound once: which are, and with what."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from leedl_fast.kernels import (
    add_layer_norm,
    add_layer_norm_backward,
    attention,
    attention_backward,
    attention_blocks,
    attention_delta,
    diffusion,
    launching,
)
from leedl_fast.kernels.attention_tiles import precision
from leedl_fast.kernels.launching import Launch, Launcher
from leedl_fast.ops.add_layer_norm import Problem
from leedl_fast.ops.attention_problem import Inputs, describe
from leedl_fast.ops.diffusion_operators import Problem as DiffusionProblem


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


def test_launches_of_diffusion_list_the_kernels_arguments_in_order() -> None:
    problem = DiffusionProblem((2, 3, 700), torch.float32, torch.device("cpu"), 2.0, 1.0)
    for launcher, programs in (
        (diffusion._launch_randn, 6),
        (diffusion._launch_add_noise, 6),
        (diffusion._launch_loss_partial, 6),
        (diffusion._launch_loss_sum, 2),
        (diffusion._launch_loss_backward, 6),
        (diffusion._launch_step, 6),
    ):
        launch = launcher._plan(problem)
        names = list(inspect.signature(launch.kernel.fn).parameters)
        after = names.index("blocks" if launch.kernel is diffusion._loss_sum_kernel else "n")
        assert launch.programs == programs
        assert all(name.endswith("_ptr") for name in names[:after])
        assert len(names) == after + len(launch.numbers) + len(launch.constants)
        assert names[after + len(launch.numbers) :] == list(launch.constants)


@pytest.mark.parametrize("taken", [(True, False), (False, True)], ids=["noise", "seeds"])
def test_steps_are_bound_by_which_tensors_there_are(
    taken: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = _Kernel()
    plan = diffusion._launch_step._plan
    monkeypatch.setattr(
        diffusion, "_launch_step", Launcher(lambda *key: plan(*key)._replace(kernel=kernel))
    )
    x, six, seeds = torch.empty(2, 64), torch.empty(2, 6), torch.empty(2, dtype=torch.int64)
    problem = DiffusionProblem((2, 64), x.dtype, x.device)
    noise, keys = (x if taken[0] else None), (seeds if taken[1] else None)
    for clip_range in (None, 1.0, None):
        diffusion.step(
            problem._replace(clip_range=clip_range), x, x, None, x, noise, six, keys, keys
        )
    assert [args[-2:] for _, args, _ in kernel.bound] == [(1.0, None), (1.0, 1.0)]
    ((_, args),) = kernel.again
    assert args[:3] == (x.data_ptr(), x.data_ptr(), None)
    assert args[-4:] == (64, 1.0, None, 1024)


def _addresses(arguments: Any) -> Any:
    return tree_map(lambda x: x.data_ptr() if isinstance(x, Tensor) else x, arguments)


@pytest.mark.parametrize("with_extras", [False, True])
def test_attention_is_launched_again_with_the_same_arguments(
    with_extras: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The addresses where the tensors were, in every field of every kernel."""
    kernels = {}
    for module, name, launcher, plan in (
        (attention, "_forward_kernel", "_launch_forward", "_forward_launch"),
        (attention_delta, "_delta_kernel", "_launch", "_delta_launch"),
        (attention_backward, "_query_kernel", "_launch_query", "_query_launch"),
        (attention_backward, "_key_value_kernel", "_launch_key_value", "_key_value_launch"),
    ):
        kernels[name] = _Kernel()
        monkeypatch.setattr(module, name, kernels[name])
        monkeypatch.setattr(module, launcher, Launcher(getattr(module, plan)))
    q, k, bias = torch.empty(2, 4, 80, 16), torch.empty(2, 2, 80, 16), torch.empty(1, 4, 80, 80)
    integers = torch.empty(2, dtype=torch.int64)
    inputs = Inputs(q, k, k)
    if with_extras:
        inputs = Inputs(q, k, k, bias, torch.empty(4), torch.empty(2, 4), integers, seed=integers)
    dropout_p = 0.1 if with_extras else 0.0
    problem = describe(inputs, 0.1, 9, 0, "softmax", None, dropout_p, False)
    row, dsinks = torch.empty(2, 4, 80), torch.empty(4)
    for _ in range(2):
        attention.forward(problem, q, row, row, row, *inputs)
        gradients = torch.empty_like(q), k, k, torch.empty(0), dsinks
        attention_backward.backward(problem, *gradients, q, row, *inputs, q, row, row)
    for name, kernel in kernels.items():
        ((grid, arguments, constants),), ((grid_again, again),) = kernel.bound, kernel.again
        numbers = {n: x for n, x in constants.items() if n.isupper()}
        expected = *_addresses(arguments), *numbers.values()
        assert grid_again == grid
        if name == "_forward_kernel":
            assert again == expected
        else:  # delta, dq and the parts of dsinks lie elsewhere each time
            flat, flat_again = tree_leaves(expected), tree_leaves(again)
            assert len(flat) == len(flat_again)
            moved = [x for x, y in zip(flat, flat_again, strict=True) if x != y]
            assert all(isinstance(x, int) and x > 4096 for x in moved)
            assert len(moved) <= 2


@contextmanager
def _allowing_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def test_either_way_to_allow_tf32_is_heard() -> None:
    """Also the old one after the new one, whose `allow_tf32` torch refuses to read."""
    with _allowing_tf32():
        assert precision(torch.float32) == "tf32"
    assert precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precision(torch.float32) == "ieee"


def test_other_strides_and_precisions_are_bound_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel()
    monkeypatch.setattr(attention, "_forward_kernel", kernel)
    monkeypatch.setattr(attention, "_launch_forward", Launcher(attention._forward_launch))
    q, row = torch.empty(1, 2, 80, 16), torch.empty(1, 2, 80)
    other = q.transpose(1, 2).contiguous().transpose(1, 2)
    problem = describe(Inputs(q, q, q), 0.1, 9, 0, "softmax", None, 0.0, False)
    for q_of_call in (q, other, q):
        attention.forward(problem, q, row, row, row, *Inputs(q_of_call, q, q))
    assert (len(kernel.bound), len(kernel.again)) == (2, 1)
    with _allowing_tf32():
        attention.forward(problem, q, row, row, row, *Inputs(q, q, q))
    with attention_blocks.changed(num_warps=2):
        attention.forward(problem, q, row, row, row, *Inputs(q, q, q))
    assert len(kernel.bound) == 4


def test_descriptors_are_made_of_the_tensors_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel()
    monkeypatch.setattr(attention, "_forward_kernel", kernel)
    monkeypatch.setattr(attention, "_launch_forward", Launcher(attention._forward_launch))
    q, row = torch.empty(1, 2, 80, 16), torch.empty(1, 2, 80)
    problem = describe(Inputs(q, q, q), 0.1, 9, 0, "softmax", None, 0.0, False)
    with attention_blocks.changed(descriptors=True):
        for _ in range(2):
            attention.forward(problem, q, row, row, row, *Inputs(q, q, q))
    assert (len(kernel.bound), len(kernel.again)) == (2, 0)
