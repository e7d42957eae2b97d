"""Fused kernels for the layers of attention and diffusion models, as drop-in PyTorch layers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leedl_fast.backends import use_backend
    from leedl_fast.integrations import patch, unpatch, verify
    from leedl_fast.ops import diffusion
    from leedl_fast.ops.add_layer_norm import add_layer_norm
    from leedl_fast.ops.additive_attention import additive_attention
    from leedl_fast.ops.attention import attention
    from leedl_fast.ops.linear_cross_entropy import linear_cross_entropy
    from leedl_fast.ops.scaled_dot_product_attention import scaled_dot_product_attention

__version__ = "0.1.0"
__all__ = [
    "add_layer_norm",
    "additive_attention",
    "attention",
    "diffusion",
    "linear_cross_entropy",
    "patch",
    "scaled_dot_product_attention",
    "unpatch",
    "use_backend",
    "verify",
]

# Imported on first use: PyTorch takes seconds, and `leedl-fast --help` needs none of it.
_HOME = dict.fromkeys(__all__, "ops") | {
    "use_backend": "backends",
    **dict.fromkeys(("patch", "unpatch", "verify"), "integrations"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
