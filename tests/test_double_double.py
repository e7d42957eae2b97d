"""The oracle of float64 against mpmath's arithmetic of 50 digits, and PyTorch's own results."""

import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor
from torch.nn import functional as F

from leedl_fast.testing.double_double import parts
from leedl_fast.testing.double_double_tensor import DoubleDouble

FUNCTIONS = {
    "add": (lambda x, y: x + y, lambda x, y: x + y),
    "sub": (lambda x, y: 1 - 3 * x - y, lambda x, y: 1 - 3 * x - y),
    "mul": (lambda x, y: x * y, lambda x, y: x * y),
    "div": (lambda x, y: x / y, lambda x, y: x / y),
    "exp": (lambda x, y: (10 * x).exp(), lambda x, y: mp.exp(10 * x)),
    "log": (lambda x, y: (x * x).log(), lambda x, y: mp.log(x * x)),
    "sqrt": (lambda x, y: (x * x + y * y).sqrt(), lambda x, y: mp.sqrt(x * x + y * y)),
    "rsqrt": (lambda x, y: (x * x).rsqrt(), lambda x, y: 1 / abs(x)),
    "tanh": (lambda x, y: x.tanh(), lambda x, y: mp.tanh(x)),
    "sigmoid": (lambda x, y: x.sigmoid(), lambda x, y: 1 / (1 + mp.exp(-x))),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(x: Tensor) -> list:
    high, low = (part.flatten().tolist() for part in parts(x))
    return [mpf(a) + mpf(b) for a, b in zip(high, low, strict=True)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_20_digits(name: str) -> None:
    ours, theirs = FUNCTIONS[name]
    x, y = DoubleDouble(drawn(40)), DoubleDouble(drawn(40, seed=1))
    x = x / 3  # both parts of it count
    with mp.workdps(50):
        expected = [theirs(a, b) for a, b in zip(exact(x), exact(y), strict=True)]
        for got, wanted in zip(exact(ours(x, y)), expected, strict=True):
            assert abs(got - wanted) <= mpf(10) ** -20 * abs(wanted)


def test_matrix_products_have_25_digits() -> None:
    a = DoubleDouble(drawn(3, 65) * torch.logspace(-8, 8, 65, dtype=torch.float64)) / 3
    b = drawn(65, 2, seed=1)
    with mp.workdps(50):
        left, right = exact(a), exact(b)
        sums = [
            sum(left[i * 65 + k] * right[k * 2 + j] for k in range(65))
            for i in range(3)
            for j in range(2)
        ]
        for got, wanted in zip(exact(a @ b), sums, strict=True):
            assert abs(got - wanted) <= mpf(10) ** -25 * abs(wanted)


def composed(x: Tensor, weight: Tensor) -> Tensor:
    """Most of what the references call."""
    bias = weight[0]
    y = F.layer_norm(x, x.shape[-1:], bias, bias) + F.rms_norm(x, x.shape[-1:], bias)
    scores = (y @ weight.mT).masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
    mixed = torch.softmax(scores, -1) @ y + torch.relu(y) * torch.sigmoid(y).mean(-1, keepdim=True)
    nll = F.cross_entropy(mixed, torch.tensor([0, 2, 1, 3, 0]), label_smoothing=0.1)
    return nll + scores.logsumexp(-1).sum() + mixed.clamp(-0.5, 0.5).pow(2).sum()


def test_derivatives_are_those_of_float64_within_its_error() -> None:
    inputs = [drawn(5, 8), drawn(5, 8, seed=1)]
    plain = [x.clone().requires_grad_() for x in inputs]
    wide = [DoubleDouble(x).requires_grad_() for x in inputs]
    value, expected = composed(*plain), composed(*wide)
    gradients = torch.autograd.grad(value, plain)
    exact_gradients = torch.autograd.grad(expected, wide)
    for got, wanted in zip((value, *gradients), (expected, *exact_gradients), strict=True):
        torch.testing.assert_close(got, parts(wanted).high, rtol=1e-13, atol=1e-13)
        assert parts(wanted).low.abs().max() > 0  # it is more than float64


def test_infinities_stay_what_they_are() -> None:
    x = DoubleDouble(torch.tensor([torch.inf, -torch.inf, 1.0], dtype=torch.float64))
    for result in (x + 1, x * 2, x.exp(), x / 3, torch.softmax(x[1:], -1)):
        assert not parts(result).high.isnan().any()
        assert parts(result).low.isfinite().all()


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"DoubleDouble has no aten\.sort"):
        torch.sort(DoubleDouble(drawn(3)))
