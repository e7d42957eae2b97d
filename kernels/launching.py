"""Launches that are bound once. Triton's binder looks at every argument of every call, which takes
longer than a small kernel runs.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import triton
from torch import Tensor

_MOST = 4096  # launches that are kept
_ALIGNMENT = 16  # bytes; Triton compiles another kernel for addresses that are no multiple


def strides_of(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [tensor.stride() for tensor in tensors]


class Launch(NamedTuple):
    """A kernel's arguments: the tensors, or what `arranged` makes of them, then numbers, then
    constants, in the kernel's order.

    programs: how many run. options: the compiler's, num_warps among them. arranged: takes the
    tensors or, unless needs_tensors, their addresses.
    """

    kernel: Any
    programs: int
    numbers: tuple
    constants: dict[str, Any]
    options: dict[str, Any]
    arranged: Callable[..., tuple] | None = None
    needs_tensors: bool = False

    def run(self, tensors: tuple[Tensor | None, ...]) -> Any:
        """The compiled kernel, or None where nothing is compiled."""
        arguments = tensors if self.arranged is None else self.arranged(*tensors)
        return self.kernel[(self.programs, 1, 1)](
            *arguments, *self.numbers, **self.constants, **self.options
        )


def bind(compiled: Any, programs: int) -> Callable[..., None]:
    """launch(*arguments) of a kernel that has run on the current device, which it runs on again.

    What Triton's own `compiled[grid]` does, which makes the metadata of its hooks and calls them
    whether or not there are any, and takes longer for that than for all the rest.
    """
    with_hooks = compiled[(programs, 1, 1)]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    driver, knobs = triton.runtime.driver.active, triton.knobs.runtime
    device, stream_of = driver.get_current_device(), driver.get_current_stream

    def launch(*arguments: Any) -> None:
        if knobs.launch_enter_hook.calls or knobs.launch_exit_hook.calls:  # a profiler's
            with_hooks(*arguments)
            return
        run(programs, 1, 1, stream_of(device), function, metadata, None, None, None, *arguments)

    return launch


class Launcher:
    """Launches `plan(*key)` with tensors, which come first in the kernel's arguments.

    The key, and which tensors are None, decide all but their addresses: dtypes, device, strides.
    """

    def __init__(self, plan: Callable[..., Launch]) -> None:
        self._plan = plan
        # launch, arranged, and the arguments after the tensors
        self._bound: dict[Hashable, tuple[Callable[..., None], Callable | None, tuple]] = {}

    def __call__(self, key: tuple, *tensors: Tensor | None) -> None:
        bits = absent = 0
        pointers: list[int | None] = []
        for tensor in tensors:
            absent = 2 * absent + (tensor is None)
            if tensor is None:
                pointers.append(None)
            else:
                pointer = tensor.data_ptr()
                bits |= pointer
                pointers.append(pointer)
        is_aligned = bits % _ALIGNMENT == 0
        bound = self._bound.get((key, absent)) if is_aligned else None
        if bound is not None:
            run, arranged, others = bound
            run(*(pointers if arranged is None else arranged(*pointers)), *others)
            return
        launch = self._plan(*key)
        compiled = launch.run(tensors)
        if compiled is not None and is_aligned and not launch.needs_tensors:
            if len(self._bound) >= _MOST:
                self._bound.clear()
            others = (*launch.numbers, *launch.constants.values())
            self._bound[key, absent] = bind(compiled, launch.programs), launch.arranged, others

    def forget(self) -> None:
        """What was bound; another plan may hold now."""
        self._bound.clear()
