// Standard normal numbers from pairs of random words: Box-Muller out of IEEE-exact operations only, so that every
// implementation (scalar, AVX2, AVX-512, CUDA, Triton, plain PyTorch) gives the same bits.
//
// Element i of a sample comes from word i & 3 of philox_words(seed, i >> 2, stream). Words (0, 1) give elements 0 and
// 1, words (2, 3) give elements 2 and 3. Below, (a, b) is such a pair, z0 = r cos(2 pi b / 2^32) is its first element
// and z1 = r sin(2 pi b / 2^32) its second, with r = sqrt(-2 ln u) and u = (a + 1/2) / 2^32. Where a >= 2^31, u is held
// as u - 1, so that float32 is precise at both ends of (0, 1). |z| < 6.77; the error against float64 is below 2e-6.
//
// The recipe. Everything is float32, rounded to nearest even; fma rounds once; no plain add takes a plain product,
// which a compiler could contract into an fma; int32(.) reinterprets 32 bits; float(.) converts an int32.
//   Radius
//     g = fma(float(int32(a)), 0x1p-32, 0x1p-33)             |g| in [2^-33, 1/2]
//     if a < 2^31:  k = float((bits(g) >> 23) - 126)         u = g = 2^k (1 + t), t in [-1/2, 0)
//                   t = float_of_bits((bits(g) & 0x007fffff) | 0x3f000000) - 1
//     otherwise:    k = 0, t = g                             u = 1 + t
//     p = kLog[7]; for i = 6 .. 0: p = fma(p, t, kLog[i])    -2 ln(1 + t) / t
//     r = sqrt(fma(t, p, k * kMinusTwoLn2))                  correctly rounded sqrt
//     r = float_of_bits(bits(r) ^ ((b + 2^30) & 2^31))       the angle's half turn, b + 2^30 modulo 2^32
//   Angle, left within a quarter turn of zero: x = 1 is pi / 2
//     x = float(int32(b << 1)) * 0x1p-31
//     y = x * x
//     c = kCos[4]; for i = 3 .. 0: c = fma(c, y, kCos[i])    cos(pi x / 2)
//     s = kSin[4]; for i = 3 .. 0: s = fma(s, y, kSin[i])    sin(pi x / 2) / x
//   z0 = r * c
//   z1 = (r * x) * s
// The polynomials are minimax fits (relative error 1.5e-7 for the logarithm, absolute 5e-8 and 4e-9 for cos and sin).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace leedl {

constexpr float kMinusTwoLn2 = -0x1.62e430p+0f;

// Functions rather than arrays: device code cannot read a host's constexpr array, and these fold away.
LEEDL_HOST_DEVICE constexpr float log_coefficient(int i) {
  constexpr float kLog[8] = {-0x1.fffffcp+0f, 0x1.0004cap+0f,  -0x1.53d3ccp-1f, 0x1.16c8d8p-1f,
                             -0x1.3771b2p-4f, 0x1.922402p+0f, 0x1.14dfd0p+1f,  0x1.2f57aap+1f};
  return kLog[i];
}

LEEDL_HOST_DEVICE constexpr float cos_coefficient(int i) {
  constexpr float kCos[5] = {0x1.fffffep-1f, -0x1.3bd3a6p+0f, 0x1.03bd06p-2f, -0x1.54f61ap-6f, 0x1.c1f066p-11f};
  return kCos[i];
}

LEEDL_HOST_DEVICE constexpr float sin_coefficient(int i) {
  constexpr float kSin[5] = {0x1.921fb4p+0f, -0x1.4abbb6p-1f, 0x1.46676ep-4f, -0x1.323310p-8f, 0x1.3c4c4ap-13f};
  return kSin[i];
}

constexpr int kLogDegree = 7, kCosDegree = 4, kSinDegree = 4;

LEEDL_HOST_DEVICE uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

LEEDL_HOST_DEVICE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

struct NormalPair {
  float z0, z1;
};

LEEDL_HOST_DEVICE NormalPair normal_pair(uint32_t a, uint32_t b) {
  const float g = fmaf(static_cast<float>(static_cast<int32_t>(a)), 0x1p-32f, 0x1p-33f);
  float k = 0.0f, t = g;
  if (a < 0x80000000u) {
    const uint32_t bits = bits_of_float(g);
    k = static_cast<float>(static_cast<int32_t>(bits >> 23) - 126);
    t = float_of_bits((bits & 0x007fffffu) | 0x3f000000u) - 1.0f;
  }
  float p = log_coefficient(kLogDegree);
  for (int i = kLogDegree - 1; i >= 0; --i) p = fmaf(p, t, log_coefficient(i));
  float r = sqrtf(fmaf(t, p, k * kMinusTwoLn2));
  r = float_of_bits(bits_of_float(r) ^ ((b + 0x40000000u) & 0x80000000u));

  const float x = static_cast<float>(static_cast<int32_t>(b << 1)) * 0x1p-31f;
  const float y = x * x;
  float c = cos_coefficient(kCosDegree), s = sin_coefficient(kSinDegree);
  for (int i = kCosDegree - 1; i >= 0; --i) c = fmaf(c, y, cos_coefficient(i));
  for (int i = kSinDegree - 1; i >= 0; --i) s = fmaf(s, y, sin_coefficient(i));
  return {r * c, (r * x) * s};
}

// Elements 4*block .. 4*block + 3 of a sample.
LEEDL_HOST_DEVICE void normal_block(uint64_t seed, uint64_t block, uint32_t stream, float out[4]) {
  const Philox4x32 words = philox_words(seed, block, stream);
  const NormalPair first = normal_pair(words.word[0], words.word[1]);
  const NormalPair second = normal_pair(words.word[2], words.word[3]);
  out[0] = first.z0;
  out[1] = first.z1;
  out[2] = second.z0;
  out[3] = second.z1;
}

}  // namespace leedl
