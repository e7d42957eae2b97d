"""What every op is made of: a cached check, operators that only fill their outputs, and
differentiable gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active as in_functorch_transform
from torch.compiler import is_compiling

from leedl_fast.backends import Implementation, requested, select, table
from leedl_fast.backends.compiled import PLAIN_TYPES
from leedl_fast.backends.cpu_modules import signature as compiled_signature
from leedl_fast.ops import checks
from leedl_fast.ops.checks import kind

LIBRARY = torch.library.Library("leedl_fast", "DEF")
OPERATORS: dict[str, "Operator"] = {}


class Operator:
    """One kernel as a functional operator, `leedl_fast::<name>` to torch.compile and torch.export.

    `allocate(problem, *tensors)` makes the outputs: it is the fake implementation, and the first
    half of the real one; the kernel called `name` of the chosen implementation fills them.
    `describe(*tensors, *options)` makes the Problem again from what a graph carries: the tensors
    and the plain values that `options(problem)` lists.
    """

    def __init__(
        self,
        op: str,
        name: str,
        schema: str,
        num_tensors: int,
        *,
        allocate: Callable[..., tuple[Tensor, ...]],
        describe: Callable[..., Any],
        options: Callable[[Any], tuple],
    ) -> None:
        self.op, self.name, self.num_tensors = op, name, num_tensors
        self.allocate, self.describe, self.options = allocate, describe, options
        OPERATORS[name] = self
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, self._run_from_graph, "CPU")
        LIBRARY.impl(name, self._run_from_graph, "CUDA")
        torch.library.register_fake(f"leedl_fast::{name}", self._fake, lib=LIBRARY)

    def __call__(
        self, implementation: Implementation, problem: Any, *tensors: Tensor | None
    ) -> Any:
        """Allocate and fill, at once."""
        outputs = self.allocate(problem, *tensors)
        implementation.kernels[self.name](problem, *outputs, *tensors)
        return outputs if len(outputs) > 1 else outputs[0]

    def from_graph(
        self, implementation: Implementation, problem: Any, *tensors: Tensor | None
    ) -> Any:
        """The same through torch's dispatcher, for tracing."""
        operator = getattr(torch.ops.leedl_fast, self.name)
        return operator(*tensors, *self.options(problem), implementation.backend)

    def _run_from_graph(self, *arguments: Any) -> Any:
        tensors, problem, backend = self._unpack(arguments)
        return self(table(backend)[self.op], problem, *tensors)

    def _fake(self, *arguments: Any) -> Any:
        tensors, problem, _ = self._unpack(arguments)
        outputs = self.allocate(problem, *tensors)
        return outputs if len(outputs) > 1 else outputs[0]

    def _unpack(self, arguments: Sequence[Any]) -> tuple[Sequence[Tensor | None], Any, str]:
        *values, backend = arguments
        return values[: self.num_tensors], self.describe(*values), backend

    def register_autograd(self, setup_context: Callable, backward: Callable) -> None:
        torch.library.register_autograd(
            f"leedl_fast::{self.name}", backward, setup_context=setup_context, lib=LIBRARY
        )


class Resolved(NamedTuple):
    """What runs a call. traced: see `traced`, of the tensors that were resolved."""

    problem: Any
    implementation: Implementation
    traced: bool


def resolver(op: str, check: Callable[..., Any], *names: str) -> Callable[..., Resolved]:
    """`resolve(backend, tensors, *options)`: checks and selection, run once per distinct call.

    names: of the tensors, "bias?" where None may stand. `check(*kinds, *options)` makes the
    Problem of the Kind of each tensor.
    """
    memo: dict[Any, Resolved] = {}
    optional = tuple(name.endswith("?") for name in names)
    plain_names = tuple(name.removesuffix("?") for name in names)

    def run_checks(backend: str | None, tensors: Sequence[Any], options: tuple) -> Resolved:
        for name, may_be_absent, tensor in zip(plain_names, optional, tensors, strict=True):
            if tensor is not None or not may_be_absent:
                checks.check_tensor(name, tensor)
        problem = check(*map(kind, tensors), *options)
        return Resolved(problem, select(op, problem, backend), traced(*tensors))

    def resolve(backend: str | None, tensors: tuple[Tensor | None, ...], *options: Any) -> Resolved:
        backend = requested(backend)
        if dispatched():
            return run_checks(backend, tensors, options)
        key = (signature(*tensors), backend, options)
        try:
            resolved = memo.get(key)
        except TypeError:  # an option of a wrong type, unhashable: the check says what is wrong
            return run_checks(backend, tensors, options)
        if resolved is not None:
            return resolved
        resolved = run_checks(backend, tensors, options)
        if key[0] is not None:
            if len(memo) >= MOST_REMEMBERED:
                memo.clear()
            memo[key] = resolved
        return resolved

    return resolve


MOST_REMEMBERED = 4096  # calls per op


def _signature(*tensors: Any) -> Any:
    """A key that is equal for tensors of equal shapes, dtypes and devices; None for a tensor of a
    subclass, or what is none."""
    plain = all(tensor is None or type(tensor) in PLAIN_TYPES for tensor in tensors)
    return tuple(map(kind, tensors)) if plain else None


signature = compiled_signature() or _signature


def dispatched() -> bool:
    """True when every call must go through torch's dispatcher: under torch.compile, or under a
    functorch transform."""
    return is_compiling() or in_functorch_transform()


def traced(*tensors: Tensor | None) -> bool:
    """True when calls must go through torch's dispatcher: under torch.compile, under a functorch
    transform, or with fake and proxy tensors."""
    if dispatched():
        return True
    # A loop, here and below, for a generator would cost as much as a small kernel.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and type(tensor) not in PLAIN_TYPES:
            return True
    return False


def needs_grad(*tensors: Tensor | None) -> bool:
    """True when an autograd node must be made."""
    if is_grad_enabled():
        for tensor in tensors:
            # What is no tensor needs none: the checks, which come later, say what is wrong with it.
            if tensor is not None and getattr(tensor, "requires_grad", False):
                return True
    return False


class Function(torch.autograd.function._SingleLevelFunction):
    """An autograd node without the support for functorch that torch.autograd.Function looks for in
    each argument of each call: `traced` sends those calls through the dispatcher."""

    apply: ClassVar[Callable[..., Any]]


def reference_gradients(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
) -> Any:
    """Gradients of `function` by plain PyTorch, themselves differentiable: what a backward with
    create_graph returns.
    """
    # A view of each input keeps the gradients of one tensor that was passed twice apart.
    views = [x if x is None or not x.requires_grad else x.view_as(x) for x in inputs]
    outputs = function(*views)
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grad_outputs, strict=True)
        if output is not None and grad is not None and output.requires_grad
    ]
    wanted = [view for view in views if view is not None and view.requires_grad]
    grads = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(grads) if view is not None and view.requires_grad else None for view in views)
