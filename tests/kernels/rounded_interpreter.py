"""Triton's interpreter, made to round as hardware does; import it before any kernel.

Two of its shortcuts would hide what a kernel does: it cuts float32 off to bfloat16 where every GPU
rounds to nearest, and its dots go through a BLAS that adds in another order for every shape, so
that scores made again in another tile differ from the first ones. Two of its habits, patching the
language again at every call of a device function and checking integers for overflow, only cost
time: most of it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_convert_float = interpreter._convert_float


def _convert_float_rounded(
    x: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: Any
) -> np.ndarray:
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(x, source, target, rounding_mode)
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), 0x7FC0, rounded >> np.uint32(16)).astype(np.uint16)


def _dot(
    self: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    d: TensorHandle,
    input_precision: Any,
    max_num_imprecise_acc: Any,
) -> TensorHandle:
    assert a.data.dtype.kind == "f", "the interpreter holds bfloat16 numbers as integers"
    product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
    return TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)


_patched_modules: set[str] = set()


def _call_device_function(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    if self.fn.__module__ not in _patched_modules:
        interpreter._patch_lang(self.fn)
        _patched_modules.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


interpreter._convert_float = _convert_float_rounded
InterpreterBuilder.create_dot = _dot
InterpretedFunction.__call__ = _call_device_function
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
