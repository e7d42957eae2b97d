"""The library's random numbers in Triton: the recipe of csrc/common/normal.h, bit for bit.

Nothing here adds to a product without tl.fma, so fp fusion cannot change a bit.
"""

import triton
import triton.language as tl

_MULTIPLIER0 = tl.constexpr(0xD2511F53)
_MULTIPLIER1 = tl.constexpr(0xCD9E8D57)
_WEYL0 = tl.constexpr(0x9E3779B9)
_WEYL1 = tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(10)

# Coefficients of csrc/common/normal.h, lowest power first.
_MINUS_TWO_LN2 = tl.constexpr(float.fromhex("-0x1.62e430p+0"))
_LOG = tl.constexpr(
    tuple(
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
)
_COS = tl.constexpr(
    tuple(
        map(
            float.fromhex,
            (
                "0x1.fffffep-1",
                "-0x1.3bd3a6p+0",
                "0x1.03bd06p-2",
                "-0x1.54f61ap-6",
                "0x1.c1f066p-11",
            ),
        )
    )
)
_SIN = tl.constexpr(
    tuple(
        map(
            float.fromhex,
            (
                "0x1.921fb4p+0",
                "-0x1.4abbb6p-1",
                "0x1.46676ep-4",
                "-0x1.323310p-8",
                "0x1.3c4c4ap-13",
            ),
        )
    )
)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four random words for each counter (c0, c1, c2, c3) and key (k0, k1), all uint32."""
    for _ in tl.static_range(_ROUNDS):
        high0 = tl.umulhi(c0, _MULTIPLIER0)
        low0 = c0 * _MULTIPLIER0
        high1 = tl.umulhi(c2, _MULTIPLIER1)
        low1 = c2 * _MULTIPLIER1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + _WEYL0
        k1 = k1 + _WEYL1
    return c0, c1, c2, c3


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    value = tl.full(x.shape, COEFFICIENTS[DEGREE], tl.float32)
    for i in tl.static_range(DEGREE):
        value = tl.fma(value, x, tl.full(x.shape, COEFFICIENTS[DEGREE - 1 - i], tl.float32))
    return value


@triton.jit
def normal_pair(a, b):
    """Two independent standard normal numbers for each pair of random words."""
    word = a.to(tl.int32, bitcast=True)
    g = tl.fma(
        word.to(tl.float32),
        tl.full(a.shape, 2.0**-32, tl.float32),
        tl.full(a.shape, 2.0**-33, tl.float32),
    )
    bits = g.to(tl.int32, bitcast=True)
    below_half = word >= 0
    k = tl.where(below_half, ((bits >> 23) - 126).to(tl.float32), 0.0)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    t = tl.where(below_half, mantissa - 1.0, g)
    r = tl.sqrt_rn(tl.fma(t, _polynomial(t, _LOG, 7), k * _MINUS_TWO_LN2))
    half_turn = (b + 0x40000000) & 0x80000000
    r = (r.to(tl.uint32, bitcast=True) ^ half_turn).to(tl.float32, bitcast=True)

    x = (b << 1).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-31
    y = x * x
    return r * _polynomial(y, _COS, 4), (r * x) * _polynomial(y, _SIN, 4)


@triton.jit
def standard_normal(seed, stream, first, BLOCK: tl.constexpr):
    """Elements first .. first + BLOCK - 1 of one sample's noise, float32; first is a multiple of 4.

    seed: int64 scalar, all bits count; stream: int64 scalar, its low 32 bits count.
    """
    block = first // 4 + tl.arange(0, BLOCK // 4)  # int64 [BLOCK // 4]
    zero = tl.zeros((BLOCK // 4,), tl.uint32)
    w0, w1, w2, w3 = philox4x32(
        (block & 0xFFFFFFFF).to(tl.uint32),
        (block >> 32).to(tl.uint32),
        zero + (stream & 0xFFFFFFFF).to(tl.uint32),
        zero,
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    z0, z1 = normal_pair(w0, w1)
    z2, z3 = normal_pair(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
