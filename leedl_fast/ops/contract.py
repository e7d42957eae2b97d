"""What every op is made of: a cached check, operators that only fill their outputs, and
differentiable gradients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from leedl_fast.backends import Implementation, requested, select, table

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


def resolver(op: str, check: Callable[..., Any]) -> Callable[..., tuple[Any, Implementation]]:
    """`resolve(backend, *key)` -> (Problem, Implementation); checks and selection run once per
    distinct key.
    """

    def resolve(backend: str | None, *key: Any) -> tuple[Any, Implementation]:
        problem = check(*key)
        return problem, select(op, problem, backend)

    memo = functools.lru_cache(maxsize=4096)(resolve)

    def lookup(backend: str | None, *key: Any) -> tuple[Any, Implementation]:
        backend = requested(backend)
        if torch.compiler.is_compiling():
            return resolve(backend, *key)
        try:
            return memo(backend, *key)
        except TypeError:  # an unhashable argument or a wrong type: the check says what is wrong
            return resolve(backend, *key)

    return lookup


def traced(*tensors: Tensor | None) -> bool:
    """True when calls must go through torch's dispatcher: under torch.compile, under a functorch
    transform, or with fake and proxy tensors."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    # A loop, here and below, for a generator would cost as much as a small kernel.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and type(tensor) not in _PLAIN:
            return True
    return False


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def needs_grad(*tensors: Tensor | None) -> bool:
    """True when an autograd node must be made."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
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
