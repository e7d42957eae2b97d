"""Checks of arguments, written once. Every error names the argument, the rule and what came."""

import math
from collections.abc import Collection
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Kind(NamedTuple):
    """What most checks need to know of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def kind(tensor: Tensor | None) -> Kind | None:
    return None if tensor is None else Kind(tensor.shape, tensor.dtype, tensor.device)


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_floating(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {dtype}")


def check_same_dtype(name: str, dtype: torch.dtype, expected: torch.dtype, of: str) -> None:
    if dtype != expected:
        raise TypeError(f"{name} must have the dtype of {of}, {expected}, got {dtype}")


def check_same_device(name: str, device: torch.device, expected: torch.device, of: str) -> None:
    if device != expected:
        raise ValueError(f"{name} must be on the device of {of}, {expected}, got {device}")


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(shape)}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")


def check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")


def check_finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not abs(value) < math.inf:  # also traced, for symbolic numbers
        raise ValueError(f"{name} must be finite, got {value}")


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """low <= values <= high, for an integer tensor; read only where that costs no device
    synchronisation.
    """
    if values.device.type != "cpu" or values.numel() == 0 or torch.compiler.is_compiling():
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(values))
    if smallest < low or largest > high:
        bad = smallest if smallest < low else largest
        raise ValueError(f"{name} must lie in [{low}, {high}], got {bad}")


def check_integer_vector(
    name: str, values: Tensor | Kind, batch: int, device: torch.device
) -> None:
    if values.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {values.dtype}")
    check_shape(name, values.shape, (batch,))
    check_same_device(name, values.device, device, "the other tensors")
