"""Fused kernels for the layers of attention and diffusion models, as drop-in PyTorch layers."""

from leedl_fast.backends import use_backend
from leedl_fast.ops import add_layer_norm, attention, diffusion

__version__ = "0.1.0"
__all__ = ["add_layer_norm", "attention", "diffusion", "use_backend"]
