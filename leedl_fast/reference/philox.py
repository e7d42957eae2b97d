"""The library's random numbers in plain PyTorch, bit for bit as every backend makes them.

Philox4x32-10 and Box-Muller; `csrc/common/normal.h` states the recipe and why it gives the same
bits everywhere. Words are int64 tensors of 32 bits each: PyTorch has no arithmetic on uint32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]

# Coefficients of csrc/common/normal.h, lowest power first.
_MINUS_TWO_LN2 = float.fromhex("-0x1.62e430p+0")
_LOG = tuple(
    map(
        float.fromhex,
        (
            "-0x1.fffffcp+0",
            "0x1.0004cap+0",
            "-0x1.53d3ccp-1",
            "0x1.16c8d8p-1",
            "-0x1.3771b2p-4",
            "0x1.922402p+0",
            "0x1.14dfd0p+1",
            "0x1.2f57aap+1",
        ),
    )
)
_COS = tuple(
    map(
        float.fromhex,
        ("0x1.fffffep-1", "-0x1.3bd3a6p+0", "0x1.03bd06p-2", "-0x1.54f61ap-6", "0x1.c1f066p-11"),
    )
)
_SIN = tuple(
    map(
        float.fromhex,
        ("0x1.921fb4p+0", "-0x1.4abbb6p-1", "0x1.46676ep-4", "-0x1.323310p-8", "0x1.3c4c4ap-13"),
    )
)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of a 32 x 32 bit product, by partial products that fit in int64."""
    low = (word & 0xFFFF) * multiplier
    high = (word >> 16) * multiplier + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random words for each counter and key (10 rounds).

    Args:
        counter: four int64 tensors of words (0 to 2^32 - 1) that broadcast with each other.
        key: two such tensors, which broadcast with the counter.

    Returns:
        Four int64 tensors of words.

    Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _fma(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """a * b + c of float32 numbers, rounded once.

    The product is exact in float64. Its sum with c is rounded to odd there (an inexact sum gets an
    odd last bit), after which rounding to float32 gives what one rounding of the exact value gives
    (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    product = a.double() * b.double()
    addend = torch.as_tensor(c, dtype=torch.float64).expand_as(product)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # TwoSum: total + error is exact
    bits = total.view(torch.int64)
    # Of an inexact sum with an even last bit, the neighbour on the error's side is the odd one.
    outward = (error > 0) == (total > 0)
    odd = torch.where(outward, bits + 1, bits - 1)
    rounded = torch.where((error != 0) & (bits & 1 == 0), odd, bits)
    return rounded.view(torch.float64).float()


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = _fma(value, x, coefficient)
    return value


def _signed(word: Tensor) -> Tensor:
    """The low 32 bits as an int32 number, in float32."""
    return (((word & _MASK) ^ 0x80000000) - 0x80000000).float()


def _normal_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers for each pair of random words."""
    word = _signed(a)
    g = _fma(word, torch.full_like(word, 2.0**-32), 2.0**-33)
    bits = g.view(torch.int32)
    below_half = a < 0x80000000
    k = torch.where(below_half, ((bits >> 23) - 126).float(), 0.0)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)
    t = torch.where(below_half, mantissa - 1.0, g)
    # The square root is taken in float64: PyTorch's float32 one is not always correctly rounded.
    r = torch.sqrt(_fma(t, _polynomial(_LOG, t), k * _MINUS_TWO_LN2).double()).float()
    r = torch.where((b + 0x40000000) & 0x80000000 != 0, -r, r)

    x = _signed(b << 1) * 2.0**-31
    y = x * x
    return r * _polynomial(_COS, y), (r * x) * _polynomial(_SIN, y)


def standard_normal(n: int, seeds: Tensor, streams: Tensor | None = None) -> Tensor:
    """Standard normal noise of one seed per sample.

    Element i of a sample comes from word i % 4 of Philox4x32-10, with the sample's seed as the key
    and (i // 4, stream, 0) as the counter; pairs of words become pairs of numbers by Box-Muller.

    Args:
        n: numbers per sample.
        seeds: int64, (batch,): all 64 bits count.
        streams: int64, (batch,) or None (stream 0): the low 32 bits count. One seed gives
            independent noise in each stream.

    Returns:
        float32, (batch, n), on the device of `seeds`.
    """
    block = torch.arange((n + 3) // 4, device=seeds.device)
    stream = torch.zeros_like(seeds) if streams is None else streams
    zero = torch.zeros_like(block)
    counter = (block & _MASK, block >> 32, (stream & _MASK)[:, None], zero)
    key = ((seeds & _MASK)[:, None], (seeds >> 32 & _MASK)[:, None])
    words = philox4x32(counter, key)
    numbers = (*_normal_pair(words[0], words[1]), *_normal_pair(words[2], words[3]))
    return torch.stack(numbers, dim=-1).flatten(1)[:, :n].contiguous()  # [batch, n]


# The counter's last word sets these masks apart from each other and from noise.
ATTENTION_STREAM = 1
ADD_LAYER_NORM_STREAM = 2


def dropout_threshold(dropout_p: float) -> int:
    """A random word below this drops its element."""
    return int(dropout_p * 2**32)


def attention_dropout_mask(
    seed: Tensor,
    first_sample: int,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
) -> Tensor:
    """True where attention keeps its probability: (batch, num_heads, seqlen_q, seqlen_k).

    Query i, key j of head h of sample b takes word j & 3 of the counter (j >> 2, i, b * num_heads +
    h, ATTENTION_STREAM) under the key `seed`, whatever the sequences' lengths.
    """
    device = seed.device
    key = (seed & _MASK, (seed >> 32) & _MASK)
    block = torch.arange((seqlen_k + 3) // 4, device=device)
    query = torch.arange(seqlen_q, device=device)[:, None]
    head = torch.arange(first_sample * num_heads, (first_sample + batch) * num_heads, device=device)
    stream = torch.full_like(head, ATTENTION_STREAM)[:, None, None]
    words = philox4x32((block, query, head[:, None, None], stream), key)
    word = torch.stack(words, dim=-1).flatten(-2)[..., :seqlen_k]
    return (word >= dropout_threshold(dropout_p)).view(batch, num_heads, seqlen_q, seqlen_k)


def add_layer_norm_dropout_mask(seed: Tensor, rows: int, n: int, dropout_p: float) -> Tensor:
    """True where add_layer_norm keeps an element of the branch: (rows, n).

    Column j of row i takes word j & 3 of the counter (j >> 2, i, i >> 32, ADD_LAYER_NORM_STREAM)
    under the key `seed`.
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    block = torch.arange((n + 3) // 4, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    stream = torch.full_like(row, ADD_LAYER_NORM_STREAM)
    words = philox4x32((block, row & _MASK, row >> 32, stream), key)
    word = torch.stack(words, dim=-1).flatten(1)[:, :n]
    return word >= dropout_threshold(dropout_p)
