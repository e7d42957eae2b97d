"""torch.nn's attention and Transformer layers on the fused kernels.

Modules keep their parameters, hooks and state dicts. Two things differ from torch.nn: a query that
sees no key gives zeros instead of NaN; and an encoder's padded positions hold what its layers make
of them, in evaluation too, where torch.nn may put zeros there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leedl_fast.integrations.changes import Change, new_forward
from leedl_fast.integrations.masks import Mask, padding
from leedl_fast.layers.add_layer_norm import dropout_inside, widened
from leedl_fast.layers.attention import packed_projection
from leedl_fast.layers.feed_forward import feed_forward
from leedl_fast.ops.add_layer_norm import add_layer_norm
from leedl_fast.ops.attention import attention
from leedl_fast.ops.scaled_dot_product_attention import as_bias


def changes(model: nn.Module) -> Iterator[Change]:
    """Every torch.nn.MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer and
    TransformerEncoder in `model`; classes that inherit from one and have a forward of their own
    are not torch.nn's any more, and are not looked at.
    """
    for path, module in model.named_modules():
        kind = next((kind for kind in _FORWARDS if isinstance(module, kind)), None)
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            yield _without_nested_tensors(path)
        if kind is None or type(module).forward is not kind.forward or "forward" in vars(module):
            continue
        was, reason = f"torch.nn.{type(module).__name__}", _reason(module)
        if reason:
            yield Change(path, was, reason=reason)
        else:
            forward, now = _FORWARDS[kind]
            yield new_forward(path, was, now, forward)


def _reason(module: nn.Module) -> str:
    """Why a module is left alone, or ""."""
    if isinstance(module, nn.MultiheadAttention):
        if module.bias_k is not None:
            return "add_bias_kv is on"
        return "add_zero_attn is on" if module.add_zero_attn else ""
    for name, norm in module.named_children():
        if name.startswith("norm") and (
            type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1
        ):
            return f"{name} is {norm}, not a LayerNorm over one dimension"
    return ""


def _without_nested_tensors(path: str) -> Change:
    def switch(module: Any, to: bool) -> None:
        module.use_nested_tensor = to

    return Change(
        path,
        "torch.nn.TransformerEncoder",
        "padded batches stay padded",
        apply=partial(switch, to=False),
        undo=partial(switch, to=True),
    )


def _multihead_attention(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch.nn.MultiheadAttention.forward; weights that are asked for come from there."""
    if need_weights or query.is_nested:
        return nn.MultiheadAttention.forward(
            self,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )
    if is_causal and attn_mask is None:
        raise ValueError("attn_mask must be given with is_causal=True, got None")
    batched = query.dim() == 3
    sequence = 1 if self.batch_first or not batched else 0  # its dimension, beside that of batch
    q, k, v = (_split_heads(x, self.num_heads, sequence) for x in _project(self, query, key, value))
    causal = is_causal and q.shape[2] == k.shape[2]
    mask = Mask()
    if key_padding_mask is not None:
        hidden = key_padding_mask.reshape(q.shape[0], k.shape[2])
        if hidden.dtype == torch.bool:
            mask = padding(~hidden, q.dtype)
        else:
            mask = Mask(bias=as_bias(hidden, q.dtype)[:, None, None, :])
    if attn_mask is not None and not causal:
        seen = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
        bias = as_bias(seen, q.dtype)
        mask = mask.add(bias if bias.dim() == 2 else bias.unflatten(0, (-1, self.num_heads)))
    dropout_p = self.dropout if self.training else 0.0
    out = attention(
        q,
        k,
        v,
        causal=causal,
        key_lengths=mask.key_lengths,
        bias=mask.bias,
        dropout_p=dropout_p,
    ).transpose(1, 2)
    out = (out if sequence == 1 else out.transpose(0, 1)).flatten(2)
    return self.out_proj(out if batched else out.squeeze(0)), None


def _project(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    bias = module.in_proj_bias
    if module._qkv_same_embed_dim:
        sizes = [module.embed_dim] * 3
        return packed_projection(query, key, value, module.in_proj_weight, bias, sizes)
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(map(F.linear, (query, key, value), weights, biases))


def _split_heads(x: Tensor, num_heads: int, sequence: int) -> Tensor:
    """A view (batch, num_heads, seqlen, head_dim) of (batch, seqlen, width), of (seqlen, batch,
    width), or of (seqlen, width)."""
    if x.dim() == 2:
        x = x[None]
    x = x.unflatten(2, (num_heads, -1))
    return x.transpose(1, 2) if sequence == 1 else x.permute(1, 2, 0, 3)


def _encoder_layer(
    self: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """torch.nn.TransformerEncoderLayer.forward."""
    if src.is_nested:
        return nn.TransformerEncoderLayer.forward(
            self, src, src_mask, src_key_padding_mask, is_causal
        )

    def attend(x: Tensor) -> Tensor:
        return _branch(self.self_attn, x, x, src_mask, src_key_padding_mask, is_causal)

    if self.norm_first:
        branch = attend(self.norm1(src))
        x, residual = _add_norm(self.norm2, branch, src, self.dropout1)
        return residual + self.dropout2(_feed_forward(self, x))
    x = _post_norm(self.norm1, attend(src), src, self.dropout1)
    return _post_norm(self.norm2, _feed_forward(self, x), x, self.dropout2)


def _decoder_layer(
    self: nn.TransformerDecoderLayer,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> Tensor:
    """torch.nn.TransformerDecoderLayer.forward."""

    def attend(x: Tensor) -> Tensor:
        return _branch(self.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

    def attend_to_memory(x: Tensor) -> Tensor:
        masks = (memory_mask, memory_key_padding_mask, memory_is_causal)
        return _branch(self.multihead_attn, x, memory, *masks)

    if self.norm_first:
        x, residual = _add_norm(self.norm2, attend(self.norm1(tgt)), tgt, self.dropout1)
        x, residual = _add_norm(self.norm3, attend_to_memory(x), residual, self.dropout2)
        return residual + self.dropout3(_feed_forward(self, x))
    x = _post_norm(self.norm1, attend(tgt), tgt, self.dropout1)
    x = _post_norm(self.norm2, attend_to_memory(x), x, self.dropout2)
    return _post_norm(self.norm3, _feed_forward(self, x), x, self.dropout3)


def _branch(
    module: nn.Module,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor:
    return module(
        x,
        memory,
        memory,
        attn_mask=mask,
        key_padding_mask=padding,
        is_causal=is_causal,
        need_weights=False,
    )[0]


def _feed_forward(
    layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, x: Tensor
) -> Tensor:
    return feed_forward(x, layer.linear1, layer.activation, layer.dropout, layer.linear2)


def _add_norm(
    norm: nn.LayerNorm, x: Tensor, residual: Tensor, dropout: nn.Module
) -> tuple[Tensor, Tensor]:
    """norm(dropout(x) + residual), and that sum."""
    x, dropout_p = dropout_inside(dropout, x)
    return add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=dropout_p)


def _post_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor, dropout: nn.Module) -> Tensor:
    return _add_norm(norm, widened(x, residual), residual, dropout)[0]


_FORWARDS: dict[type[nn.Module], tuple[Callable, str]] = {
    nn.MultiheadAttention: (_multihead_attention, "attention"),
    nn.TransformerEncoderLayer: (_encoder_layer, "add_layer_norm"),
    nn.TransformerDecoderLayer: (_decoder_layer, "add_layer_norm"),
}
