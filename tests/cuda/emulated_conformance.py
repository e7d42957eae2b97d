"""The CUDA kernels on CPU tensors, in the emulator: every sample against float64."""

from dataclasses import replace

import pytest
import torch
from emulated_module import use_emulator
from torch import Tensor

from leedl_fast.backends import cuda
from leedl_fast.ops import add_layer_norm, diffusion_operators
from leedl_fast.testing.compare import assert_conforms, equal_bits
from leedl_fast.testing.noise import noise_is_the_cpus, steps_are_the_cpus
from leedl_fast.testing.samples import CASES, Case

use_emulator()

TAKEN = [case for case in CASES if case.op in cuda.TABLE and case.op != "attention"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(case: Case, dtype: torch.dtype) -> None:
    try:
        assert_conforms(case, dtype, "cuda")
    except NotImplementedError as error:  # what the table's `unsupported` says
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_conformance(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("shape", [(3, 8200), (2, 12999), (35, 16384)], ids=str)
@pytest.mark.parametrize("name", ["rms-bias", "dropout-odd", "wide-dropout", "plain"])
def test_rows_longer_than_the_registers(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """In the backward pass alone, or in both; some parts of the last have several rows."""
    (case,) = (case for case in CASES if str(case) == f"add_layer_norm-{name}")
    shapes = {key: shape if len(old) > 1 else shape[-1:] for key, old in case.shapes.items()}
    check(replace(case, shapes=shapes), dtype)


@pytest.mark.parametrize("n", [5, 40, 260, 1030])
def test_a_row_does_not_depend_on_the_rows_around_it(n: int) -> None:
    x, residual = torch.randn(2, 19, n)
    weight, dnormed = torch.randn(n), torch.randn(19, n)

    def run(rows: slice) -> tuple[Tensor, ...]:
        leaf = residual[rows].clone().requires_grad_()
        normed, summed = add_layer_norm(x[rows], leaf, weight, backend="cuda")
        return normed, summed, *torch.autograd.grad(normed, leaf, dnormed[rows])

    whole = run(slice(None))
    for row in (0, 7, 18):
        alone = run(slice(row, row + 1))
        assert all(map(equal_bits, (part[row : row + 1] for part in whole), alone))


@pytest.mark.parametrize("n", [1, 6, 64, 133])
def test_dropout_drops_what_the_cpu_backend_drops(n: int) -> None:
    x = torch.rand(21, n) + 1

    def run(name: str) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        options = {"dropout_p": 0.3, "seed": 2**45 + 9, "backend": name}
        _, summed = add_layer_norm(leaf, torch.zeros_like(x), **options)
        return summed == 0, torch.autograd.grad(summed.sum(), leaf)[0] == 0

    assert all(map(torch.equal, run("cuda"), run("cpu")))


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("n", [1, 3, 4, 1023, 1025, 4096])
def test_noise_is_the_cpu_backends_bit_for_bit(n: int, dtype: torch.dtype) -> None:
    assert noise_is_the_cpus("cuda", n, dtype)


@pytest.mark.parametrize("n", [700, 701])
def test_diffusion_steps_are_the_cpu_backends_bit_for_bit(n: int) -> None:
    assert steps_are_the_cpus("cuda", n)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    output, sample = torch.randn(2, 3, 20000)
    coefficients = torch.rand(3, 2, dtype=torch.float64)
    seeds = torch.tensor([4, 5, 6])

    def run(batch: slice) -> Tensor:
        inputs = output[batch], sample[batch], None, coefficients[batch], seeds[batch]
        problem = diffusion_operators.Problem((len(inputs[0]), 20000), output.dtype, output.device)
        return diffusion_operators.loss_forward(cuda.TABLE["diffusion"], problem, *inputs)

    assert torch.equal(run(slice(None)), torch.cat([run(slice(i, i + 1)) for i in range(3)]))
