"""Arithmetic on unevaluated sums of two float64 numbers: twice the precision, to judge float64 by.

A number is high + low with |low| at most half an ulp of high (Dekker 1971, "A floating-point
technique for extending the available precision"; Hida, Li and Bailey 2001, "Algorithms for
quad-double precision floating point arithmetic"). Where `high` is not finite, `low` is 0. Operands
are Parts, what has both parts as attributes, tensors and Python's numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    high: Tensor
    low: Tensor


def parts(x: Any) -> Parts:
    """Both parts of an operand."""
    if isinstance(x, Parts):
        return x
    if hasattr(x, "low"):
        return Parts(x.high, x.low)
    x = torch.as_tensor(x, dtype=torch.float64)
    return Parts(x, torch.zeros_like(x))


def _finite(x: Tensor) -> Tensor:
    """A correction: none where there is nothing to correct."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def _normalize(high: Tensor, low: Tensor) -> Parts:
    """The sum of two parts of which `high` is the larger."""
    low = _finite(low)
    total = high + low
    return Parts(total, _finite(low - (total - high)))


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        scaled = x * (2.0**27 + 1)
        upper = scaled - (scaled - x)
        return upper, x - upper

    product = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def blockwise(function: Callable[..., Parts]) -> Callable[..., Parts]:
    """A function of single numbers, of as many at once as the caches hold."""

    @functools.wraps(function)
    def run(*operands: Any) -> Parts:
        pairs = [parts(x) for x in operands]
        shape = torch.broadcast_shapes(*(x.high.shape for x in pairs))
        if math.prod(shape) <= BLOCK:
            return function(*pairs)
        blocks = [
            [Parts(*block) for block in zip(*(_in_blocks(part, shape) for part in x), strict=True)]
            for x in pairs
        ]
        results = [function(*block) for block in zip(*blocks, strict=True)]
        return Parts(*(torch.cat(part).view(shape) for part in zip(*results, strict=True)))

    return run


BLOCK = 2**14


def _in_blocks(x: Tensor, shape: torch.Size) -> Sequence[Tensor]:
    return x.expand(shape).reshape(-1).split(BLOCK)


@blockwise
def plus(x: Parts, y: Parts) -> Parts:
    high, error = _two_sum(x.high, y.high)
    return _normalize(high, error + (x.low + y.low))


def add(x: Any, y: Any, *, alpha: float = 1) -> Parts:
    return plus(x, y if alpha == 1 else mul(y, alpha))


def neg(x: Any) -> Parts:
    x = parts(x)
    return Parts(-x.high, -x.low)


def sub(x: Any, y: Any, *, alpha: float = 1) -> Parts:
    return add(x, neg(y), alpha=alpha)


@blockwise
def mul(x: Parts, y: Parts) -> Parts:
    product, error = _two_product(x.high, y.high)
    return _normalize(product, error + (x.high * y.low + x.low * y.high))


@blockwise
def div(x: Parts, y: Parts) -> Parts:
    quotient = parts(x.high / y.high)
    for _ in range(2):
        quotient = add(quotient, _finite(sub(x, mul(quotient, y)).high / y.high))
    return quotient


# The natural logarithm of 2.
LN2 = Parts(
    torch.tensor(float.fromhex("0x1.62e42fefa39efp-1"), dtype=torch.float64),
    torch.tensor(float.fromhex("0x1.abc9e3b39803fp-56"), dtype=torch.float64),
)


@blockwise
def exp(x: Parts) -> Parts:
    """exp(x) = 2^k exp(r), with exp(r) - 1 from that of r / 64 in six doublings; to 70 bits."""
    k = (x.high / math.log(2)).clamp(-1100, 1100).round()
    small = mul(sub(x, mul(LN2, k)), 2.0**-6)
    rest = torch.zeros_like(small.high)
    for n in range(9, 2, -1):  # rest / r^3 of the series: float64 is enough for it
        rest = rest * small.high + 1 / math.factorial(n)
    series = add(small, mul(mul(small, small), add(mul(small, rest), 0.5)))
    for _ in range(6):
        series = mul(series, add(series, 2.0))
    series = add(series, 1.0)
    high = torch.where(x.high.isinf(), x.high.exp(), torch.ldexp(series.high, k))
    return _normalize(high, torch.ldexp(series.low, k))


@blockwise
def log(x: Parts) -> Parts:
    """One step of Newton's method from float64's logarithm."""
    first = x.high.log()
    return add(first, _finite(sub(mul(x, exp(-first)), 1.0).high))


@blockwise
def sqrt(x: Parts) -> Parts:
    first = x.high.sqrt()
    return add(first, _finite(sub(x, mul(first, first)).high / (2 * first)))


@blockwise
def tanh(x: Parts) -> Parts:
    e = exp(mul(Parts(x.high.abs(), x.low * x.high.sign()), -2.0))
    return mul(div(sub(1.0, e), add(1.0, e)), x.high.sign())


@blockwise
def sigmoid(x: Parts) -> Parts:
    return div(1.0, add(1.0, exp(neg(x))))


def power(x: Any, exponent: float) -> Parts:
    if exponent not in (1, 2, 3):
        raise NotImplementedError(f"DoubleDouble has no power {exponent}")
    result = x = parts(x)
    for _ in range(int(exponent) - 1):
        result = mul(result, x)
    return result


def total(x: Any, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Parts:
    """The sum along `dim`, all by default, in pairs."""
    x = parts(x)
    dims = dim if dim else range(x.high.dim())
    dims = sorted({d % max(x.high.dim(), 1) for d in dims}, reverse=True)
    for d in dims:
        while (count := x.high.shape[d]) != 1:
            if count == 0:
                shape = [1 if i == d else n for i, n in enumerate(x.high.shape)]
                x = parts(x.high.new_zeros(shape))
                break
            half = count // 2
            left, right, odd = (
                Parts(*(part.narrow(d, start, length) for part in x))
                for start, length in ((0, half), (half, half), (2 * half, count - 2 * half))
            )
            paired = add(left, right)
            x = Parts(*(torch.cat(both, d) for both in zip(paired, odd, strict=True)))
    if not keepdim:
        for d in dims:
            x = Parts(x.high.squeeze(d), x.low.squeeze(d))
    return x


def mean(x: Any, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Parts:
    summed = total(x, dim, keepdim)
    return div(summed, parts(x).high.numel() / max(summed.high.numel(), 1))


def select(condition: Tensor, x: Any, y: Any) -> Parts:
    x, y = parts(x), parts(y)
    return Parts(torch.where(condition, x.high, y.high), torch.where(condition, x.low, y.low))


def matmul(a: Any, b: Any) -> Parts:
    """(..., m, k) by (..., k, n): the sum of products of slices, each of them exact (Ozaki et al.
    2012, "Error-free transformations of matrix multiplication")."""
    a, b = parts(a), parts(b)
    bits = (52 - math.ceil(math.log2(max(a.high.shape[-1], 1)))) // 2
    a_slices, b_slices = list(_slices(a, -1, bits)), list(_slices(b, -2, bits))
    plain = a.high @ b.high
    result = parts(torch.zeros_like(plain))
    for i in reversed(range(SLICES)):
        for j in reversed(range(SLICES - i)):
            result = add(result, a_slices[i] @ b_slices[j])
    return select(plain.isfinite(), result, plain)


SLICES = 5


def _slices(x: Parts, dim: int, bits: int) -> Iterator[Tensor]:
    """Numbers of at most `bits` bits that add up to x, the largest first, on one grid along dim."""
    if x.high.numel() == 0:
        yield from [x.high] * SLICES
        return
    _, exponent = torch.frexp(x.high.abs().amax(dim, keepdim=True))
    for i in range(1, SLICES + 1):
        to_grid = torch.ldexp(
            torch.full(exponent.shape, 1.5 * 2.0**52, dtype=torch.float64), exponent - bits * i
        )
        piece = _finite((x.high + to_grid) - to_grid)
        yield piece
        x = _normalize(x.high - piece, x.low)


def batched_matmul(a: Any, b: Any) -> Parts:
    """The same of (batch, m, k) and (batch, k, n), some of the batch at once."""
    a, b = parts(a), parts(b)
    batch = a.high.shape[0]
    at_once = max(1, batch * 4 * BLOCK // max(a.high.numel() + b.high.numel(), 1))
    if at_once >= batch:
        return matmul(a, b)
    blocks = zip(*(part.split(at_once) for part in (*a, *b)), strict=True)
    results = [matmul(Parts(*block[:2]), Parts(*block[2:])) for block in blocks]
    return Parts(*(torch.cat(part) for part in zip(*results, strict=True)))


def _shifted(x: Parts, dim: int) -> tuple[Parts, Tensor]:
    """x less its maximum, a float64 number, and that maximum; 0 where that is infinite."""
    if x.high.shape[dim] == 0:
        return x, x.high.sum(dim, keepdim=True)
    largest = x.high.amax(dim, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    return sub(x, largest), largest


def softmax(x: Any, dim: int, half_to_float: bool = False) -> Parts:
    e = exp(_shifted(parts(x), dim)[0])
    return div(e, total(e, [dim], True))


def softmax_backward(grad: Any, out: Any, dim: int, input_dtype: torch.dtype) -> Parts:
    product = mul(grad, out)
    return sub(product, mul(out, total(product, [dim], True)))


def log_softmax(x: Any, dim: int, half_to_float: bool = False) -> Parts:
    shifted, _ = _shifted(parts(x), dim)
    return sub(shifted, log(total(exp(shifted), [dim], True)))


def log_softmax_backward(grad: Any, out: Any, dim: int, input_dtype: torch.dtype) -> Parts:
    return sub(grad, mul(exp(out), total(grad, [dim], True)))


def logsumexp(x: Any, dim: Sequence[int], keepdim: bool = False) -> Parts:
    (d,) = dim
    shifted, largest = _shifted(parts(x), d)
    result = add(log(total(exp(shifted), [d], True)), largest)
    return result if keepdim else Parts(result.high.squeeze(d), result.low.squeeze(d))
