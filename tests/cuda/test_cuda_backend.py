"""What the CUDA backend says where it cannot run."""

import re
import shutil
import sys

import pytest
import torch

from leedl_fast.backends import cuda, select, triton
from leedl_fast.ops import diffusion
from leedl_fast.ops.add_layer_norm import Problem

needs_module = pytest.mark.skipif(cuda.reason() is not None, reason=str(cuda.reason()))


def test_the_module_is_built_where_there_is_nvcc() -> None:
    """It needs no GPU, neither to be built nor to be imported. A build that failed is no reason to
    skip the rest.
    """
    if shutil.which("nvcc") is None and (reason := cuda.reason()) is not None:
        assert reason.startswith("no nvcc was found")
        pytest.skip(reason)
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
    reason = cuda.unsupported_device(torch.device("cuda"))
    assert re.match("CUDA says cudaError(InsufficientDriver|NoDevice): ", reason or "")


def _problem(**changes: object) -> Problem:
    dtypes = dict.fromkeys(("dtype", "residual_dtype", "parameter_dtype"), torch.float32)
    options = {"rows": 3, "n": 4, "eps": 1e-5, "norm": "layer", "dropout_p": 0.0}
    return Problem(**{**options, **dtypes, "device": torch.device("cuda"), **changes})


@needs_module
def test_it_runs_where_triton_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unsupported_device", lambda device: None)
    for reason, expected in ((None, "triton"), ("Triton cannot be imported", "cuda")):
        monkeypatch.setattr(triton, "_unsupported", lambda problem, reason=reason: reason)
        table = {"add_layer_norm": triton.Implementation("triton", triton._unsupported, {})}
        monkeypatch.setattr(triton, "TABLE", table)
        assert select("add_layer_norm", _problem()).backend == expected


@needs_module
def test_what_the_kernels_do_not_take() -> None:
    with pytest.raises(NotImplementedError, match="cuda: takes float32, bfloat16 and float16, got"):
        select("add_layer_norm", _problem(dtype=torch.float64), "cuda")
    with pytest.raises(NotImplementedError, match="cuda: has no such op"):
        select("linear_cross_entropy", _problem(), "cuda")
