"""Properties of residual + LayerNorm that a comparison of numbers does not show, and its errors."""

import pytest
import torch

from leedl_fast import add_layer_norm
from leedl_fast.backends import cpu_modules
from leedl_fast.reference.philox import add_layer_norm_dropout_mask
from leedl_fast.testing.compare import poisoned_outputs

ISA = pytest.mark.parametrize("isa", cpu_modules.modules())


def _gradients(x: torch.Tensor, weight: torch.Tensor, **options: object) -> list[torch.Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    normed, summed = add_layer_norm(x, 2 * x, weight, weight, backend="cpu", **options)
    scale = torch.linspace(-1, 1, normed.numel()).view_as(normed)
    loss = (normed * scale + summed * scale.square()).sum()
    return [normed, summed, *torch.autograd.grad(loss, (x, weight))]


@ISA
@pytest.mark.parametrize("shape", [(1500, 96), (5, 20000)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_threads_and_runs_change_no_bit(isa: str, shape: tuple[int, int], dropout_p: float) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    with cpu_modules.use_isa(isa):
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(_gradients(x, weight, dropout_p=dropout_p, seed=3))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@ISA
def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    x, weight = torch.randn(700, 130), torch.randn(130)
    with cpu_modules.use_isa(isa):
        whole = add_layer_norm(x, x, weight, backend="cpu")[0]
        for row in (0, 1, 350, 699):
            single = add_layer_norm(x[row : row + 1], x[row : row + 1], weight, backend="cpu")[0]
            assert torch.equal(single[0], whole[row])


@ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_outputs_too_large_for_the_caches_are_the_same(
    isa: str, dtype: torch.dtype, dropout_p: float
) -> None:
    x = torch.randn(16387, 1024, dtype=dtype)
    options = {"dropout_p": dropout_p, "seed": 3, "backend": "cpu"}
    with cpu_modules.use_isa(isa):
        whole = add_layer_norm(x, x, **options)
        half = add_layer_norm(x[:5001], x[:5001], **options)
    for first, second in zip(whole, half, strict=True):
        assert torch.equal(first[:5001], second)
    assert all(output[-1].isfinite().all() for output in whole)


@ISA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_byte_numbers_are_read_exactly_and_rounded_to_nearest_even(
    isa: str, dtype: torch.dtype
) -> None:
    """Every number that there is (infinities and NaNs too), and ties among their sums."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(2, 128, 256)
    with cpu_modules.use_isa(isa):
        for shift in (0, 1, 2, 77, 128, 129, 255):
            other = every.roll(shift, dims=1).flip(2)
            summed = add_layer_norm(every, other, backend="cpu")[1]
            expected = every + other
            is_nan = expected.isnan()
            assert torch.equal(summed.isnan(), is_nan)
            bits, expected_bits = summed.view(torch.int16), expected.view(torch.int16)
            assert torch.equal(bits[~is_nan], expected_bits[~is_nan])


@ISA
def test_a_large_mean_does_not_drown_the_variance(isa: str) -> None:
    """One pass with sums of squares in float32 would see no variance here."""
    x = torch.randn(4, 512) + 3000
    with cpu_modules.use_isa(isa):
        normed, summed = add_layer_norm(x, torch.zeros_like(x), backend="cpu")
    expected = torch.nn.functional.layer_norm(summed.double(), (512,)).float()
    torch.testing.assert_close(normed, expected, rtol=0, atol=1e-3)


@ISA
@pytest.mark.parametrize("n", [1, 3, 64, 259], ids=str)
def test_dropout_drops_what_the_mask_says(isa: str, n: int) -> None:
    x = torch.randn(37, n).abs() + 1
    seed = torch.tensor([2**50 + 12345])
    keep = add_layer_norm_dropout_mask(seed, 37, n, 0.25)
    with cpu_modules.use_isa(isa):
        _, summed = add_layer_norm(
            x, torch.zeros_like(x), dropout_p=0.25, seed=2**50 + 12345, backend="cpu"
        )
    torch.testing.assert_close(summed, torch.where(keep, x / 0.75, 0.0))
    assert torch.equal(summed != 0, keep)


def test_dropout_keeps_its_share_and_seeds_differ() -> None:
    x = torch.ones(500, 400)
    masks = [
        add_layer_norm(x, torch.zeros_like(x), dropout_p=0.2, seed=seed)[1] != 0
        for seed in (1, 2, torch.tensor([1]))
    ]
    assert torch.equal(masks[0], masks[2])
    deviation = (0.2 * 0.8 / x.numel()) ** 0.5
    for mask in masks[:2]:
        assert abs(mask.float().mean().item() - 0.8) < 5 * deviation
    assert abs((masks[0] ^ masks[1]).float().mean().item() - 0.32) < 0.01  # independent


def test_without_a_seed_torch_draws_one() -> None:
    x = torch.ones(20, 40)
    torch.manual_seed(5)
    first = add_layer_norm(x, x, dropout_p=0.5)[1]
    assert not torch.equal(first, add_layer_norm(x, x, dropout_p=0.5)[1])
    torch.manual_seed(5)
    assert torch.equal(first, add_layer_norm(x, x, dropout_p=0.5)[1])


@ISA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_residual_loses_nothing(isa: str, dtype: torch.dtype) -> None:
    """A branch below the residual's last bit in two bytes."""
    x = torch.full((5, 24), 2.0**-12, dtype=dtype)
    residual = torch.randn(5, 24)
    weight = torch.randn(24, requires_grad=True)
    with cpu_modules.use_isa(isa):
        normed, summed = add_layer_norm(x, residual, weight, backend="cpu")
    assert torch.equal(summed, residual + 2.0**-12)
    assert (normed.dtype, summed.dtype) == (dtype, torch.float32)
    (gradient,) = torch.autograd.grad(normed.float().sum(), weight)
    assert gradient.dtype == torch.float32


@ISA
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_outputs_that_the_caller_allocated(isa: str, dropout_p: float) -> None:
    x, residual = torch.randn(40, 33).bfloat16(), torch.randn(40, 33)
    out = torch.full_like(x, torch.nan), torch.full_like(residual, torch.nan)
    with cpu_modules.use_isa(isa), poisoned_outputs() as ran:
        results = add_layer_norm(x, residual, dropout_p=dropout_p, seed=1, out=out, backend="cpu")
        assert ran == []  # nothing was allocated
        expected = add_layer_norm(x, residual, dropout_p=dropout_p, seed=1, backend="cpu")
    for to, result, other in zip(out, results, expected, strict=True):
        assert to is result
        assert torch.equal(to, other)
    again = tuple(torch.full_like(to, torch.nan) for to in out)
    add_layer_norm(x, residual, dropout_p=dropout_p, seed=1, out=again, backend="eager")
    torch.testing.assert_close(again[1], out[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"out": torch.ones(3, 8)},
            TypeError,
            r"out must be a tuple \(normed, summed\), got Tensor",
        ),
        ({"out": (torch.ones(3, 8),)}, TypeError, "out must be a tuple"),
        (
            {"out": (torch.ones(3, 8), torch.ones(3, 9))},
            ValueError,
            r"out\[1\] must have shape \(3, 8\), got \(3, 9\)",
        ),
        (
            {"out": (torch.ones(3, 8).half(), torch.ones(3, 8))},
            TypeError,
            r"out\[0\] must have the dtype of x, torch.float32, got torch.float16",
        ),
        (
            {"out": (torch.ones(8, 3).t(), torch.ones(3, 8))},
            ValueError,
            r"out\[0\] must be contiguous, got strides \(1, 3\)",
        ),
        (
            {
                "out": (torch.ones(3, 8), torch.ones(3, 8)),
                "weight": torch.ones(8, requires_grad=True),
            },
            ValueError,
            "out must be None where a gradient is wanted",
        ),
    ],
)
def test_bad_out_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(3, 8), "residual": torch.ones(3, 8), **change}
    with pytest.raises(error, match=message):
        add_layer_norm(**arguments)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows sliced", "expanded", "repeated"])
def test_any_strides(layout: str) -> None:
    x = {
        "transposed": torch.randn(6, 5, 8).transpose(0, 1),
        "sliced": torch.randn(5, 6, 20)[..., 3:11],
        "rows sliced": torch.randn(5, 9, 8)[:, 1:7],
        "expanded": torch.randn(1, 6, 1).expand(5, 6, 8),
        "repeated": torch.randn(5, 1, 8).expand(5, 6, 8),
    }[layout]
    weight, bias = torch.randn(2, 16)[:, ::2]
    for actual, expected in zip(
        add_layer_norm(x, x.flip(0), weight, bias, backend="cpu"),
        add_layer_norm(x, x.flip(0), weight, bias, backend="eager"),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_only_one_output_is_used() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    summed = add_layer_norm(x, x, backend="cpu")[1]
    (gradient,) = torch.autograd.grad(summed.sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 2))
    (gradient,) = torch.autograd.grad(add_layer_norm(x, x, backend="cpu")[0].sum(), x)
    torch.testing.assert_close(gradient, torch.zeros_like(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": torch.ones(3, 7)}, ValueError, r"residual must have shape \(3, 8\), got"),
        ({"residual": torch.ones(3, 8).double()}, TypeError, "residual must have the dtype of x"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(8,\), got \(3,\)"),
        ({"bias": torch.ones(8, 1)}, ValueError, r"bias must have shape \(8,\), got \(8, 1\)"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, "bias must be on the device of x"),
        ({"x": torch.ones(3, 8).int()}, TypeError, "x must be float32.*, got torch.int32"),
        ({"x": torch.ones(()), "residual": torch.ones(())}, ValueError, "x must have a last dim"),
        ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
        ({"eps": float("inf")}, ValueError, "eps must be finite, got inf"),
        ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
        ({"residual": torch.ones(3, 8).half()}, TypeError, "residual must have the dtype of x"),
        (
            {"x": torch.ones(3, 8).half(), "weight": torch.ones(8), "bias": torch.ones(8).half()},
            TypeError,
            "bias must have the dtype of weight, torch.float32, got torch.float16",
        ),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int, got 1.5"),
        ({"norm": "batch"}, ValueError, r"norm must be one of \('layer', 'rms'\), got 'batch'"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(3, 8), "residual": torch.ones(3, 8), **change}
    with pytest.raises(error, match=message):
        add_layer_norm(**arguments)
