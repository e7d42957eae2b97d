"""What the Triton backend says where it cannot run."""

import pytest
import torch

from leedl_fast.backends import triton
from leedl_fast.ops import add_layer_norm, attention


def test_triton_is_installed() -> None:
    assert triton.reason() is None


def test_cpu_tensors_need_the_interpreter() -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match="tensors are on cpu, and Triton's interpreter"):
        attention(q, q, q, backend="triton")


def test_float64_is_not_taken() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="takes float32, bfloat16 and float16, got"):
        add_layer_norm(x, x, backend="triton")


def test_large_heads_are_not_taken() -> None:
    q = torch.randn(1, 1, 4, 257)
    with pytest.raises(NotImplementedError, match="head_dim must be at most 256, got 257"):
        attention(q, q, q, backend="triton")
