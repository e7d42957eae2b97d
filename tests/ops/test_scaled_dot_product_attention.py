"""torch's own function and ours: the same signature, results and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leedl_fast import scaled_dot_product_attention

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
SQUARE: Shapes = ((2, 4, 33, 16),) * 3
CROSS: Shapes = ((2, 4, 20, 16), (2, 4, 50, 16), (2, 4, 50, 8))
FEWER_KEYS: Shapes = ((2, 4, 50, 16), (2, 4, 20, 16), (2, 4, 20, 8))
GROUPED: Shapes = ((2, 6, 20, 16), (2, 2, 20, 16), (2, 2, 20, 16))


def _randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _boolean(*shape: int) -> Tensor:
    mask = _randn(*shape) > 0
    mask[..., 0, :] = False  # a query that sees nothing
    return mask


CASES = {
    "plain": (SQUARE, {}),
    "scale": (SQUARE, {"scale": 0.7}),
    "causal": (SQUARE, {"is_causal": True}),
    "causal-cross": (CROSS, {"is_causal": True}),
    "causal-fewer-keys": (FEWER_KEYS, {"is_causal": True}),
    "boolean": (SQUARE, {"attn_mask": _boolean(33, 33)}),
    "boolean-of-samples": (CROSS, {"attn_mask": _boolean(2, 1, 20, 50)}),
    "boolean-of-keys": (CROSS, {"attn_mask": _boolean(2, 1, 2, 50)[:, :, 1:]}),
    "float": (CROSS, {"attn_mask": _randn(4, 20, 50)}),
    "float-of-queries": (CROSS, {"attn_mask": _randn(20, 1)}),
    "grouped": (GROUPED, {"enable_gqa": True, "is_causal": True}),
    "two-dimensions": (((7, 4), (9, 4), (9, 5)), {}),
    "three-dimensions": (((3, 7, 4), (3, 9, 4), (3, 9, 5)), {"attn_mask": _randn(3, 7, 9)}),
    "five-dimensions": (
        ((2, 3, 2, 7, 4), (2, 3, 2, 9, 4), (2, 3, 2, 9, 5)),
        {"attn_mask": _randn(3, 1, 7, 9)},
    ),
    "broadcast": (((2, 1, 7, 4), (1, 3, 9, 4), (3, 9, 5)), {}),
    "no-queries": (((2, 3, 0, 4), (2, 3, 9, 4), (2, 3, 9, 4)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_torch(name: str) -> None:
    shapes, options = CASES[name]
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        inputs = [_randn(*shape).requires_grad_() for shape in shapes]
        arguments = dict(options)
        mask = arguments.get("attn_mask")
        if mask is not None and mask.dtype != torch.bool:
            arguments["attn_mask"] = mask.clone().requires_grad_()
            inputs.append(arguments["attn_mask"])
        out = function(*inputs[:3], **arguments)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_dropout_keeps_the_mean() -> None:
    q, k, v = (torch.ones(1, 8, 64, 16) for _ in range(3))
    torch.manual_seed(0)
    out = scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert out.std() > 0
    torch.manual_seed(0)
    assert torch.equal(out, scaled_dot_product_attention(q, k, v, dropout_p=0.25))


def test_a_mask_and_is_causal_exclude_each_other() -> None:
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="attn_mask must be None with is_causal=True"):
        scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(3, 3).bool(), is_causal=True)
    with pytest.raises(
        TypeError, match=r"attn_mask must be bool or floating point, got torch\.int"
    ):
        scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(3, 3, dtype=torch.int32))


def test_under_autocast_it_runs_in_the_dtype_that_torch_casts_to() -> None:
    query, key, value = (_randn(2, 4, 9, 16).float() for _ in range(3))
    double = _randn(2, 4, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
            out = function(query, key.bfloat16(), value, attn_mask=_randn(9, 9).float())
            assert out.dtype == torch.bfloat16
            assert function(double, double, double).dtype == torch.float64
        with pytest.raises(TypeError, match="k must have the dtype of q"):
            scaled_dot_product_attention(query, key.long(), value)
