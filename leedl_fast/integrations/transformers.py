"""Attention of Hugging Face transformers' models on the fused kernel.

Importing this registers the attention implementation "leedl_fast":
`AutoModel.from_pretrained(name, attn_implementation="leedl_fast")`; `leedl_fast.patch(model)` sets
it on a model that is there already. Windows, padding, sinks, softcap and position biases go to the
kernel as what they are; every other pattern of visible keys as a dense mask. No pattern is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils

from leedl_fast.integrations.changes import Change
from leedl_fast.integrations.masks import Mask, padding
from leedl_fast.ops.attention import attention
from leedl_fast.ops.scaled_dot_product_attention import (
    as_bias,
    causal_from_the_first_key,
    under_autocast,
)
from leedl_fast.ops.windows import Window

NAME = "leedl_fast"


class Pattern(NamedTuple):
    """What a mask shows of the keys: `window` as `attention` takes it, `padding` booleans (batch,
    seqlen_k) or None.
    """

    window: Window
    padding: Tensor | None


class VisibleKeys(Tensor):
    """The boolean mask (batch, 1, seqlen_q, seqlen_k) of a pattern.

    It is made only for those who compute with it: any operation on it sees the dense mask.
    """

    pattern: Pattern
    dense: Callable[[], Tensor | None]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        device: torch.device | None,
        pattern: Pattern,
        dense: Callable[[], Tensor | None],
    ) -> VisibleKeys:
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.pattern, mask.dense = pattern, dense
        return mask

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args, kwargs = tree_map_only(VisibleKeys, lambda mask: mask.dense(), (args, kwargs or {}))
        return function(*args, **kwargs)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
    **options: Any,
) -> Tensor | None:
    """transformers' mask interface: what `masking_utils.sdpa_mask` returns, and its `pattern` where
    that is a window of the queries' own positions, aligned with the last key.
    """

    def dense(**options: Any) -> Tensor | None:
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device or "cpu",
            **options,
        )

    # A graph can look into functions that close over no tensor: not into that of packed sequences,
    # which may stand where no mask is given, nor into one of the caller's (`use_vmap`).
    in_graph = torch.compiler.is_compiling()
    readable = not in_graph or not (attention_mask is None or options.get("use_vmap"))
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    window = _window(mask_function) if readable and aligned else None
    if window is None:
        return dense(**options)
    seen = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if seen is not None:
        seen = seen[:, kv_offset : kv_offset + kv_length]
    without_skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    shape = (batch_size, 1, q_length, kv_length)
    pattern = Pattern(window, seen)
    if not in_graph:
        return VisibleKeys(shape, device, pattern, lambda: dense(**(options | without_skips)))
    # A graph drops by itself what nobody computes with.
    mask = dense(**(options | without_skips))
    mask.pattern = pattern  # type: ignore[union-attr]
    return mask


@torch.compiler.assume_constant_result
def _window(mask_function: Callable) -> tuple[int | None, int | None] | None:
    """The window that a mask function of transformers stands for, or None where it is another.

    Its functions make closures, which are known by their code.
    """
    if mask_function is masking_utils.causal_mask_function:
        return None, 0
    if mask_function is masking_utils.bidirectional_mask_function:
        return None, None
    size = _closed_over(mask_function, masking_utils.sliding_window_overlay)
    if size is not None:
        return size["sliding_window"] - 1, None
    size = _closed_over(mask_function, masking_utils.sliding_window_bidirectional_overlay)
    if size is not None:
        return size["sliding_window"], size["sliding_window"]
    parts = _closed_over(mask_function, masking_utils.and_masks)
    if parts is None:
        return None
    windows = [_window(part) for part in parts["mask_functions"]]
    if None in windows:
        return None
    left, right = zip(*windows, strict=True)
    return _least(left), _least(right)


def _closed_over(function: Callable, maker: Callable) -> dict[str, Any] | None:
    """The variables that `maker` left in `function`, or None where another made it."""
    code = getattr(function, "__code__", None)
    if code is None or code not in maker.__code__.co_consts:
        return None
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def _least(sides: tuple[int | None, ...]) -> int | None:
    return min((side for side in sides if side is not None), default=None)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: object = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (batch, heads, seqlen, head_dim) to (batch, seqlen, heads,
    head_dim_v), and no weights.
    """
    if options.get("output_attentions"):
        raise ValueError(
            f"output_attentions must be False with attention {NAME!r}, which never holds the "
            'weights, got True; model.set_attn_implementation("eager") returns them'
        )
    if cache is not None:
        raise NotImplementedError(f"attention {NAME!r} has no paged cache")
    query, key, value = under_autocast(query, key, value)
    mask = Mask()
    window: Window = None
    pattern: Pattern | None = getattr(attention_mask, "pattern", None)
    if pattern is not None:
        window = pattern.window
        if pattern.padding is not None:
            mask = padding(pattern.padding, query.dtype)
    elif attention_mask is not None:
        mask = Mask(bias=as_bias(attention_mask, query.dtype))
    elif query.shape[2] > 1 and (
        is_causal if is_causal is not None else getattr(module, "is_causal", True)
    ):
        # As torch's own function aligns it, whose mask this would have been.
        key, value, window = causal_from_the_first_key(query.shape[2], key, value)
    if position_bias is not None:
        mask = mask.add(position_bias[..., : key.shape[2]].to(query.dtype))
    out = attention(
        query,
        key,
        value,
        window=window,
        softmax_scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
        key_lengths=mask.key_lengths,
        bias=mask.bias,
    )
    return out.transpose(1, 2).contiguous(), None


def changes(model: nn.Module) -> Iterator[Change]:
    """The outermost models of transformers in `model`, with all that they hold."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or path.startswith(inside):
            continue
        inside += (f"{path}." if path else "",)
        if module.config._attn_implementation != NAME:
            yield _change(path, module)


def _change(path: str, model: PreTrainedModel) -> Change:
    was = f"transformers {type(model).__name__}, attention {model.config._attn_implementation!r}"
    if not model._can_set_attn_implementation():
        return Change(path, was, reason="its attention cannot be set (transformers says so)")
    before = _implementations(model.config)
    return Change(
        path,
        was,
        "attention",
        apply=lambda model: model.set_attn_implementation(NAME),
        undo=lambda model: model.set_attn_implementation(before),
    )


def _implementations(config: Any) -> dict[str, Any]:
    """Of a configuration and those inside of it, as set_attn_implementation takes them."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": config._attn_implementation} | {
        name: _implementations(part) for name, part in parts.items() if part is not None
    }


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
