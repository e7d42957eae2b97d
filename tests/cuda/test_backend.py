"""What the CUDA backend says where it cannot run."""

import shutil
import sys

import pytest
import torch

from leedl_fast.backends import cuda
from leedl_fast.ops import diffusion

needs_module = pytest.mark.skipif(cuda.reason() is not None, reason=str(cuda.reason()))


def test_the_module_is_built_where_there_is_nvcc() -> None:
    """It needs no GPU, neither to be built nor to be imported."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    assert cuda.reason() is None


def test_a_missing_module_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "leedl_fast._cuda", None)
    cuda._load.cache_clear()
    try:
        with pytest.raises(NotImplementedError, match="cuda: not built: reinstall leedl_fast"):
            diffusion.randn((2, 3), seed=1, backend="cuda")
    finally:
        cuda._load.cache_clear()


@needs_module
def test_cpu_tensors_are_not_taken() -> None:
    with pytest.raises(NotImplementedError, match="cuda: the tensors are on cpu"):
        diffusion.randn((2, 3), seed=1, backend="cuda")


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_a_launch_says_so() -> None:
    out, seeds = torch.empty(2, 3), torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match=r"CUDA says cudaError(InsufficientDriver|NoDevice)"):
        cuda._module().randn(out, seeds)
