"""torch.nn.functional.scaled_dot_product_attention on the fused kernels."""

import math

import torch
from torch import Tensor

from leedl_fast.ops import checks
from leedl_fast.ops.attention import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The signature and the results of torch's own function, on `attention`.

    Args:
        query: (..., L, E). key: (..., S, E). value: (..., S, Ev); leading dimensions broadcast.
        attn_mask: broadcastable to (..., L, S): booleans, True where a query sees a key, or numbers
            that are added to the scores (differentiable).
        dropout_p: always applied when not 0, as in torch; the seed comes from torch's default
            generator.
        is_causal: query i sees keys 0 to i (aligned top-left, unlike `attention`).
        scale: factor on the scores; 1 / sqrt(E) by default.
        enable_gqa: dimension -3 of query may be a multiple of that of key and value.

    Returns:
        (..., L, Ev). A query that sees no key gives zeros.

    Under torch.autocast query, key and value are cast to its dtype, unless they are float64.

    Raises:
        ValueError, TypeError: as `attention`, and for a mask together with is_causal.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, got {tuple(tensor.shape)}")
    query, key, value = under_autocast(query, key, value)
    checks.check_bool("is_causal", is_causal)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None with is_causal=True, got a tensor")
    heads = slice(-3, -2) if enable_gqa else slice(0, 0)  # dimensions that do not broadcast
    last = -3 if enable_gqa else -2
    of_query, of_key, of_value = query.shape[:last], key.shape[:last], value.shape[:last]
    leading = of_query
    if not of_query == of_key == of_value:
        leading = torch.broadcast_shapes(of_query, of_key, of_value)
    shape = (*leading, *query.shape[heads])
    q, k, v = (_four_dimensions(x, (*leading, *x.shape[heads])) for x in (query, key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, shape, key.shape[-2])
    window = None
    if is_causal:
        k, v, window = causal_from_the_first_key(q.shape[2], k, v)
    out = attention(q, k, v, bias=bias, window=window, dropout_p=dropout_p, softmax_scale=scale)
    return out if len(shape) == 2 else out.reshape(*shape, *out.shape[2:])


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as torch.autocast, where it is on, hands them to torch's own function."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def causal_from_the_first_key(
    seqlen_q: int, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, tuple[None, int]]:
    """k, v and the window that hide from query i the keys after i, counted from the first of both:
    `attention` counts from the last.
    """
    # No query reaches the keys from seqlen_q on, and key j <= i is position i + shift + right for
    # shift = seqlen_k - seqlen_q <= 0.
    right = max(seqlen_q - k.shape[2], 0)
    return k[:, :, :seqlen_q], v[:, :, :seqlen_q], (None, right)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias of a mask that is True where a query sees a key, or numbers already."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    if not mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or floating point, got {mask.dtype}")
    return mask.to(dtype)


def _four_dimensions(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    """(..., seqlen, dim) broadcast to `leading` and seen as (batch, num_heads, seqlen, dim)."""
    if x.dim() == 4 and tuple(x.shape[:2]) == leading:
        return x
    x = x.expand(*leading, *x.shape[-2:])
    heads = leading[-1] if leading else 1
    return x.reshape(math.prod(leading[:-1]), heads, *x.shape[-2:])


def _bias(mask: Tensor, query: Tensor, leading: tuple[int, ...], seqlen_k: int) -> Tensor:
    checks.check_tensor("attn_mask", mask)
    mask = as_bias(mask, query.dtype)
    if mask.dim() <= 4 and len(leading) == 2:
        return mask
    return _four_dimensions(mask.expand(*leading, *mask.shape[-2:]), leading)
