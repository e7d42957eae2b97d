"""Launches that are bound once: which are, and with what."""

import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from leedl_fast.backends import triton
from leedl_fast.kernels import (
    add_layer_norm,
    add_layer_norm_backward,
    additive_attention,
    additive_attention_backward,
    attention,
    attention_bias,
    attention_blocks,
    attention_decode,
    attention_delta,
    attention_key_value,
    attention_query,
    diffusion,
    launching,
    linear_cross_entropy,
)
from leedl_fast.kernels.attention_tiles import precision
from leedl_fast.kernels.launching import Launch, Launcher
from leedl_fast.ops.add_layer_norm import Problem
from leedl_fast.ops.attention_problem import Inputs, describe
from leedl_fast.ops.diffusion_operators import Problem as DiffusionProblem
from leedl_fast.testing.samples import CASES, Case

MODULES = (
    add_layer_norm,
    add_layer_norm_backward,
    additive_attention,
    additive_attention_backward,
    attention,
    attention_bias,
    attention_decode,
    attention_delta,
    attention_key_value,
    attention_query,
    diffusion,
    linear_cross_entropy,
)
# Addresses that are no multiple of 16 bytes are bound at each call.
ALIGNED = [case for case in CASES if case.op in triton.TABLE and case.offset == 0]


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


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound launches go where Triton's own would."""
    monkeypatch.setattr(launching, "bind", lambda compiled, programs: compiled[programs, 1, 1])


bind = launching.bind


def test_a_bound_launch_goes_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stream of the moment; by way of Triton's hooks only if there are any."""
    launches: list[tuple] = []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def run(self, *args: Any) -> None:
            launches.append(args)

        def __getitem__(self, grid: tuple) -> Callable[..., None]:
            return lambda *args: launches.append((grid, args))

    class Driver:
        def get_current_device(self) -> int:
            return 3

        def get_current_stream(self, device: int) -> tuple[int, int]:
            return device, len(launches)

    monkeypatch.setattr(driver, "_active", Driver())
    launch = bind(Compiled(), 7)
    for x in (11, 12):
        launch(x, None)
    before = *(7, 1, 1), (3, 0), "function", "metadata", None, None, None
    assert launches == [(*before, 11, None), (*before[:3], (3, 1), *before[4:], 12, None)]
    hooks = knobs.runtime.launch_enter_hook
    hooks.add(launches.append)
    try:
        launch(13)
    finally:
        hooks.remove(launches.append)
    assert launches[2:] == [((7, 1, 1), (13,))]


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


@pytest.fixture
def fresh_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is bound, and what the test binds is forgotten."""
    for module in MODULES:
        for launcher in vars(module).values():
            if isinstance(launcher, Launcher):
                monkeypatch.setattr(launcher, "_bound", {})


@pytest.mark.parametrize("case", ALIGNED, ids=str)
@pytest.mark.usefixtures("fresh_launchers")
def test_a_second_call_binds_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And hands every kernel what the first did, with addresses where the tensors were."""
    bound: dict[Hashable, tuple] = {}
    again: list[tuple[Hashable, tuple]] = []

    def launch_of(name: str, grid: tuple, arguments: tuple) -> Hashable:
        return name, grid, tuple([argument is None for argument in arguments])

    class Compiled:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple) -> Callable[..., None]:
            return lambda *args: again.append((launch_of(self.name, grid, args), args))

    def run(self: JITFunction, *args: Any, grid: tuple, warmup: bool, **options: Any) -> Compiled:
        arguments = *args, *[value for name, value in options.items() if name.isupper()]
        assert len(self.params) == len(arguments)
        launch = launch_of(self.__name__, grid, arguments)
        assert launch not in bound
        bound[launch] = arguments
        return Compiled(self.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton, "is_interpreted", lambda: True)
    tensors = case.inputs(torch.float32, torch.float32)

    def call() -> None:
        outputs = case.run(tensors, "triton")
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        douts = [torch.empty_like(output) for output in outputs]
        torch.autograd.grad(outputs, list(tensors.values()), douts, allow_unused=True)

    call()
    launches = set(bound)
    again.clear()  # of one call that launches a kernel twice
    call()
    assert {launch for launch, _ in again} == set(bound) == launches
    of_inputs = {tensor.data_ptr() for tensor in tensors.values()}
    for launch, arguments in again:
        for first, second in zip(tree_leaves(bound[launch]), tree_leaves(arguments), strict=True):
            if isinstance(first, Tensor):
                address = first.data_ptr()
                assert second == address or (isinstance(second, int) and address not in of_inputs)
            else:
                assert second is first or second == first


CPU = torch.device("cpu")


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
        assert precision(torch.float32, CPU) == "tf32"
    assert precision(torch.float32, CPU) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert precision(torch.float32, CPU) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precision(torch.float32, CPU) == "ieee"


@pytest.mark.parametrize(("name", "expected"), [("gfx942:sramecc+", "tf32"), ("gfx90a", "ieee")])
def test_amd_has_tf32_on_one_architecture(
    name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with _allowing_tf32():
        assert precision(torch.float32, CPU) == expected
        assert precision(torch.bfloat16, CPU) == "ieee"


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
