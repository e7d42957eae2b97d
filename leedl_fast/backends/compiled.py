"""How a compiled module is loaded, whichever backend it belongs to."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)  # the types of tensors that need no dispatcher


def load(name: str, compiler: str) -> ModuleType | str:
    """leedl_fast.<name>, or the reason why it cannot be used. compiler: what builds it."""
    try:
        module = importlib.import_module(f"leedl_fast.{name}")
    except ModuleNotFoundError:
        report = Path(__file__).parent.parent / "_build.json"
        missing = json.loads(report.read_text())["missing"] if report.exists() else {}
        return missing.get(name, f"not built: reinstall leedl_fast on a machine with {compiler}")
    except ImportError as error:
        return f"{name} cannot be loaded: {error}"
    exchange_api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if exchange_api is None or not module.read_tensors(exchange_api, *PLAIN_TYPES):
        return f"torch {torch.__version__} has no DLPack exchange API of version 1"
    return module
