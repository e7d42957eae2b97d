"""The CUDA backend: calls of the compiled module on NVIDIA GPUs, and one table row per op."""

import importlib
import json
from functools import cache
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from leedl_fast.backends import Implementation
from leedl_fast.backends.cpu_modules import PLAIN_TYPES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # the first of setup.py's CUDA_TARGETS


@cache
def _load() -> ModuleType | str:
    """The compiled module, or the reason why there is none."""
    try:
        module = importlib.import_module("leedl_fast._cuda")
    except ModuleNotFoundError:
        report = Path(__file__).parent.parent / "_build.json"
        missing = json.loads(report.read_text())["missing"] if report.exists() else {}
        return missing.get("_cuda", "not built: reinstall leedl_fast on a machine with nvcc")
    except ImportError as error:
        return f"_cuda cannot be loaded: {error}"
    exchange_api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if exchange_api is None or not module.read_tensors(exchange_api, *PLAIN_TYPES):
        return f"torch {torch.__version__} has no DLPack exchange API of version 1"
    return module


def reason() -> str | None:
    """Why the compiled module cannot be used at all, or None."""
    module = _load()
    return module if isinstance(module, str) else None


def _module() -> Any:
    return _load()


def unsupported_device(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, or None."""
    if device.type != "cuda":
        return f"the tensors are on {device}"
    if torch.version.hip is not None:
        return "torch was built for AMD's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"needs compute capability {MIN_CAPABILITY}, got {capability}"
    return None


def _unsupported(problem: Any) -> str | None:
    if reason() is not None:
        return reason()
    if problem.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    return unsupported_device(problem.device)


def _randn(problem: Any, out: Tensor, seeds: Tensor) -> None:
    _module().randn(out, seeds)


TABLE = MappingProxyType(
    {
        "diffusion": Implementation("cuda", _unsupported, {"diffusion_randn": _randn}),
    }
)
