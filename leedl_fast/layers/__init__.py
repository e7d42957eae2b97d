"""PyTorch modules on the fused ops, with the names and parameter layouts of torch.nn."""

from leedl_fast.layers.add_layer_norm import AddLayerNorm
from leedl_fast.layers.additive_attention import AdditiveAttention
from leedl_fast.layers.attention import MultiHeadAttention
from leedl_fast.layers.attention_pooling import AttentionPooling
from leedl_fast.layers.feed_forward import FeedForward
from leedl_fast.layers.kv_cache import DecoderCache, KVCache
from leedl_fast.layers.positional import SinusoidalPositionalEncoding
from leedl_fast.layers.rotary import RotaryPositionalEncoding
from leedl_fast.layers.transformer import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "AddLayerNorm",
    "AdditiveAttention",
    "AttentionPooling",
    "DecoderCache",
    "FeedForward",
    "KVCache",
    "MultiHeadAttention",
    "RotaryPositionalEncoding",
    "SinusoidalPositionalEncoding",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
