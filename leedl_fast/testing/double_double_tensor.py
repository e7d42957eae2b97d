"""Tensors of twice float64's precision.

    exact = DoubleDouble(x)  # x: a float64 tensor
    y = torch.softmax(exact @ exact.mT, -1)  # torch's functions and autograd, to 70 bits or more
    error = (x - y.high) - y.low

Comparisons see `high` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_map

from leedl_fast.testing.double_double import (
    Parts,
    add,
    batched_matmul,
    div,
    exp,
    log,
    log_softmax,
    log_softmax_backward,
    logsumexp,
    matmul,
    mean,
    mul,
    neg,
    parts,
    power,
    select,
    sigmoid,
    softmax,
    softmax_backward,
    sqrt,
    sub,
    tanh,
    total,
)

aten = torch.ops.aten


class DoubleDouble(Tensor):
    """A float64 tensor to torch; its operations are those of RULES and of the tables below."""

    high: Tensor
    low: Tensor

    @staticmethod
    def __new__(cls, high: Tensor, low: Tensor | None = None) -> DoubleDouble:
        self = Tensor._make_wrapper_subclass(
            cls, high.shape, strides=high.stride(), dtype=high.dtype, device=high.device
        )
        self.high, self.low = high, torch.zeros_like(high) if low is None else low
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DoubleDouble({self.high}, {self.low})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub has no cls and func
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in RULES:
            result = RULES[packet](*args, **kwargs)
            return DoubleDouble(*result) if isinstance(result, Parts) else result
        if packet in MOVES:
            high = func(*tree_map(_high, args), **tree_map(_high, kwargs))
            low = func(*tree_map(_low, args), **tree_map(_low, kwargs))
            if packet in IN_PLACE:
                return args[0]
            return tree_map(DoubleDouble, high, low)
        if packet in OF_HIGH:
            return func(*tree_map(_high, args), **tree_map(_high, kwargs))
        if func in decomposition_table:
            return decomposition_table[func](*args, **kwargs)
        raise NotImplementedError(f"DoubleDouble has no {func}")


def _high(x: Any) -> Any:
    return x.high if isinstance(x, DoubleDouble) else x


def _low(x: Any) -> Any:
    if isinstance(x, DoubleDouble):
        return x.low
    is_numbers = isinstance(x, Tensor) and x.is_floating_point()
    return torch.zeros_like(x) if is_numbers else x


def _normalized(x: Any, shape: Sequence[int], eps: float) -> tuple[Parts, Parts, Parts]:
    """(x - mean) * rstd, mean and rstd over the last dimensions, those of `shape`."""
    dims, count = list(range(-len(shape), 0)), float(math.prod(shape))
    mean = div(total(x, dims, True), count)
    centered = sub(x, mean)
    variance = div(total(mul(centered, centered), dims, True), count)
    rstd = div(1.0, sqrt(add(variance, eps)))
    return mul(centered, rstd), mean, rstd


def layer_norm(x: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    out, mean, rstd = _normalized(x, shape, eps)
    out = out if weight is None else mul(out, weight)
    out = out if bias is None else add(out, bias)
    return tuple(DoubleDouble(*part) for part in (out, mean, rstd))


def layer_norm_backward(
    grad: Any,
    x: Any,
    shape: Sequence[int],
    mean: Any,
    rstd: Any,
    weight: Any,
    bias: Any,
    output_mask: Sequence[bool],
) -> Any:
    inner = list(range(-len(shape), 0))
    outer = list(range(parts(x).high.dim() - len(shape)))
    normalized = mul(sub(x, mean), rstd)
    dnormalized = parts(grad) if weight is None else mul(grad, weight)
    count = float(math.prod(shape))
    constant = div(total(dnormalized, inner, True), count)
    slope = div(total(mul(dnormalized, normalized), inner, True), count)
    dx = mul(sub(sub(dnormalized, constant), mul(normalized, slope)), rstd)
    dweight, dbias = mul(grad, normalized), parts(grad)
    if outer:
        dweight, dbias = total(dweight, outer), total(dbias, outer)
    results = zip((dx, dweight, dbias), output_mask, strict=True)
    return tuple(DoubleDouble(*part) if wanted else None for part, wanted in results)


def _clamp(x: Any, lowest: Any = None, largest: Any = None) -> Parts:
    x = parts(x)
    high = x.high.clamp(lowest, largest)
    return Parts(high, torch.where(high == x.high, x.low, 0.0))


def _absolute(x: Any) -> Parts:
    x = parts(x)
    return select(x.high < 0, neg(x), x)


def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """A copy into a plain tensor rounds."""
    source = parts(source)
    _high(target).copy_(source.high)
    if isinstance(target, DoubleDouble):
        target.low.copy_(source.low)
    return target


def _in_place(function: Callable[..., Parts]) -> Callable[..., Any]:
    def run(target: Any, *args: Any, **kwargs: Any) -> Any:
        return _copy(target, DoubleDouble(*function(target, *args, **kwargs)))

    return run


def _like(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A new tensor of one number."""

    def make(x: Any, *args: Any, **kwargs: Any) -> Any:
        return DoubleDouble(function(_high(x), *args, **kwargs))

    return make


def _to_copy(x: Any, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    if dtype in (None, torch.float64):
        return Parts(*(part.clone() for part in parts(x)))
    return _high(x).to(dtype)


# Operations by their overload packets: with rules of their own,
RULES: dict[Any, Callable[..., Any]] = {
    aten.add: add,
    aten.sub: sub,
    aten.rsub: lambda x, y, alpha=1: sub(y, x, alpha=alpha),
    aten.mul: mul,
    aten.div: div,
    aten.neg: neg,
    aten.abs: _absolute,
    aten.exp: exp,
    aten.log: log,
    aten.sqrt: sqrt,
    aten.rsqrt: lambda x: div(1.0, sqrt(x)),
    aten.reciprocal: lambda x: div(1.0, x),
    aten.pow: power,
    aten.tanh: tanh,
    aten.tanh_backward: lambda grad, out: mul(grad, sub(1.0, mul(out, out))),
    aten.sigmoid: sigmoid,
    aten.sigmoid_backward: lambda grad, out: mul(grad, mul(out, sub(1.0, out))),
    aten.relu: lambda x: select(_high(x) > 0, x, 0.0),
    aten.threshold_backward: lambda grad, x, threshold: select(_high(x) > threshold, grad, 0.0),
    aten.sum: total,
    aten.mean: mean,
    aten.mm: matmul,
    aten.bmm: batched_matmul,
    aten.addmm: lambda bias, a, b: add(bias, matmul(a, b)),
    aten._softmax: softmax,
    aten._softmax_backward_data: softmax_backward,
    aten._log_softmax: log_softmax,
    aten._log_softmax_backward_data: log_softmax_backward,
    aten.logsumexp: logsumexp,
    aten.native_layer_norm: layer_norm,
    aten.native_layer_norm_backward: layer_norm_backward,
    aten.where: select,
    aten.masked_fill: lambda x, mask, value: select(mask, value, x),
    aten.clamp: _clamp,
    aten.scatter: lambda x, dim, index, value: Parts(
        _high(x).scatter(dim, index, value), _low(x).scatter(dim, index, 0.0)
    ),
    aten.add_: _in_place(add),
    aten.copy_: _copy,
    aten._to_copy: _to_copy,
    aten.zeros_like: _like(torch.zeros_like),
    aten.ones_like: _like(torch.ones_like),
    aten.full_like: _like(torch.full_like),
    aten.new_zeros: _like(Tensor.new_zeros),
    aten.new_empty: _like(Tensor.new_empty),
}

# those that move numbers: the same for both parts,
MOVES = {
    aten.alias,
    aten.cat,
    aten.clone,
    aten.detach,
    aten.expand,
    aten.gather,
    aten.index,
    aten.index_put_,
    aten.index_select,
    aten.lift_fresh,
    aten.permute,
    aten.select,
    aten.select_backward,
    aten.slice,
    aten.slice_backward,
    aten.squeeze,
    aten.stack,
    aten.t,
    aten.transpose,
    aten.unsqueeze,
    aten.view,
    aten._unsafe_view,
}
IN_PLACE = {aten.index_put_}

# and those whose results are no numbers of this precision.
OF_HIGH = {
    aten.aminmax,
    aten.eq,
    aten.ge,
    aten.gt,
    aten.isneginf,
    aten.le,
    aten.lt,
    aten.ne,
    aten._local_scalar_dense,
}
