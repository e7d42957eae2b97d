// The random words of philox.h and the normal numbers of normal.h, a vector at a time and in the same bits.
//
// A Philox word lives in the low half of a 64-bit lane, one lane per counter. The high half may hold anything: the
// 32 x 32 bit multiply ignores it, and its product's low half is the next word as it stands.
#pragma once

#include <cstdint>

#include "../common/normal.h"
#include "simd.h"

namespace leedl {

using Words = uint32_t __attribute__((vector_size(kVectorBytes)));      // 32-bit lanes
using Counters = uint64_t __attribute__((vector_size(kVectorBytes)));   // 64-bit lanes

constexpr int kCounterLanes = kVectorBytes / 8;
constexpr int64_t kNormalsPerVectorPair = 4 * kCounterLanes;

namespace detail {

// The product of the low halves.
inline Counters multiply_low(Counters a, Counters b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Counters>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Counters>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Counters>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline Counters xor3(Counters a, Counters b, Counters c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Counters>(_mm512_ternarylogic_epi64(
      reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(c), 0x96));
#else
  return a ^ b ^ c;
#endif
}

// Low halves of `even` in the even 32-bit lanes, low halves of `odd` in the odd ones.
inline Counters merge_low(Counters even, Counters odd) {
#if defined(__AVX512F__)
  return reinterpret_cast<Counters>(
      _mm512_mask_moveldup_ps(reinterpret_cast<__m512>(even), 0xAAAA, reinterpret_cast<__m512>(odd)));
#elif defined(__AVX2__)
  return reinterpret_cast<Counters>(
      _mm256_blend_epi32(reinterpret_cast<__m256i>(even), reinterpret_cast<__m256i>(odd << 32), 0xAA));
#else
  return (even & 0xffffffffu) | (odd << 32);
#endif
}

// The same of the high halves.
inline Counters merge_high(Counters even, Counters odd) {
#if defined(__AVX512F__)
  return reinterpret_cast<Counters>(
      _mm512_mask_movehdup_ps(reinterpret_cast<__m512>(odd), 0x5555, reinterpret_cast<__m512>(even)));
#elif defined(__AVX2__)
  return reinterpret_cast<Counters>(
      _mm256_blend_epi32(reinterpret_cast<__m256i>(even >> 32), reinterpret_cast<__m256i>(odd), 0xAA));
#else
  return (even >> 32) | (odd & 0xffffffff00000000u);
#endif
}

inline Vec<float> sqrt(Vec<float> x) {
#if defined(__AVX512F__)
  return {_mm512_sqrt_ps(x.lanes)};
#elif defined(__AVX2__)
  return {_mm256_sqrt_ps(x.lanes)};
#elif defined(__SSE2__)
  return {_mm_sqrt_ps(x.lanes)};
#elif defined(__aarch64__) && defined(__ARM_NEON)
  return {vsqrtq_f32(x.lanes)};
#else
  for (int64_t i = 0; i < Vec<float>::kSize; ++i) x.lanes[i] = std::sqrt(x.lanes[i]);
  return x;
#endif
}

inline Vec<float> to_float(Words x) {
  return {__builtin_convertvector(reinterpret_cast<Vec<float>::Bits>(x), Vec<float>::Lanes)};
}

inline Vec<float> xor_bits(Vec<float> x, Words mask) {
  return {reinterpret_cast<Vec<float>::Lanes>(reinterpret_cast<Words>(x.lanes) ^ mask)};
}

// normal.h's u = 2^k (1 + t) out of g, where a is the random word: returns t and leaves the term k * kMinusTwoLn2.
inline Vec<float> split(Vec<float> g, Words a, Vec<float>& k_term) {
  const Vec<float> minus_two_ln2 = Vec<float>::broadcast(kMinusTwoLn2);
  const Vec<float> one = Vec<float>::broadcast(1.0f);
#if defined(__AVX512F__)
  const __mmask16 below_half = _mm512_testn_epi32_mask(reinterpret_cast<__m512i>(a), _mm512_set1_epi32(INT32_MIN));
  const Vec<float> exponent = {_mm512_mask_getexp_ps(_mm512_set1_ps(-1.0f), below_half, g.lanes)};
  k_term = fma(exponent, minus_two_ln2, minus_two_ln2);  // (k - 1) c + c, rounded once: the product k c
  const __m512 mantissa = _mm512_getmant_ps(g.lanes, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_zero);
  return {_mm512_mask_sub_ps(g.lanes, below_half, mantissa, one.lanes)};
#else
  using Bits = Vec<float>::Bits;
  const Bits bits = reinterpret_cast<Bits>(g.lanes);
  const Bits above_half = reinterpret_cast<Bits>(a) >> 31;
  const Vec<float> k = to_float(reinterpret_cast<Words>(((bits >> 23) - 126) & ~above_half));
  k_term = k * minus_two_ln2;
  const Vec<float> mantissa = {reinterpret_cast<Vec<float>::Lanes>((bits & 0x007fffff) | 0x3f000000)};
  const Bits reduced = reinterpret_cast<Bits>((mantissa - one).lanes);
  return {reinterpret_cast<Vec<float>::Lanes>((reduced & ~above_half) | (bits & above_half))};
#endif
}

// The pairs (a, b) of every 32-bit lane of kCount vectors, one step of all of them after the other: the processor looks
// ahead too little to find a second vector's work behind the first one's chain of dependent operations.
template <int kCount>
inline void normal_pairs(const Words* a, const Words* b, Vec<float>* z0, Vec<float>* z1) {
  using V = Vec<float>;
  V t[kCount], k_term[kCount], p[kCount], r[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    const V g = fma(to_float(a[i]), V::broadcast(0x1p-32f), V::broadcast(0x1p-33f));
    t[i] = split(g, a[i], k_term[i]);
    p[i] = V::broadcast(log_coefficient(kLogDegree));
  }
#pragma GCC unroll 8
  for (int j = kLogDegree - 1; j >= 0; --j) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], t[i], V::broadcast(log_coefficient(j)));
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    r[i] = xor_bits(sqrt(fma(t[i], p[i], k_term[i])), (b[i] + 0x40000000u) & 0x80000000u);
  }
  V x[kCount], y[kCount], c[kCount], s[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    x[i] = to_float(b[i] << 1) * V::broadcast(0x1p-31f);
    y[i] = x[i] * x[i];
    c[i] = V::broadcast(cos_coefficient(kCosDegree));
    s[i] = V::broadcast(sin_coefficient(kSinDegree));
  }
  static_assert(kCosDegree == kSinDegree);
#pragma GCC unroll 8
  for (int j = kCosDegree - 1; j >= 0; --j) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      c[i] = fma(c[i], y[i], V::broadcast(cos_coefficient(j)));
      s[i] = fma(s[i], y[i], V::broadcast(sin_coefficient(j)));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    z0[i] = r[i] * c[i];
    z1[i] = (r[i] * x[i]) * s[i];
  }
}

// Within each group of four lanes: a0 b0 a1 b1 and a2 b2 a3 b3.
inline void interleave(Vec<float> a, Vec<float> b, Vec<float>& low, Vec<float>& high) {
#if defined(__AVX512F__)
  low = {_mm512_unpacklo_ps(a.lanes, b.lanes)};
  high = {_mm512_unpackhi_ps(a.lanes, b.lanes)};
#elif defined(__AVX2__)
  low = {_mm256_unpacklo_ps(a.lanes, b.lanes)};
  high = {_mm256_unpackhi_ps(a.lanes, b.lanes)};
#else
  low = {__builtin_shuffle(a.lanes, b.lanes, Vec<float>::Bits{0, 4, 1, 5})};
  high = {__builtin_shuffle(a.lanes, b.lanes, Vec<float>::Bits{2, 6, 3, 7})};
#endif
}

}  // namespace detail

// The normal numbers of one sample.
class NormalGenerator {
 public:
  // fill() writes whole multiples of this many numbers.
  static constexpr int64_t kGroup = kNormalsPerVectorPair;

  NormalGenerator(int64_t seed, int64_t stream) : stream_(Counters{} + static_cast<uint32_t>(stream)) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const bool last = round == kPhiloxRounds - 1;  // there both keys meet one vector, see words()
      keys_[round][0] = Counters{} + (last ? key0 | static_cast<uint64_t>(key1) << 32 : key0);
      keys_[round][1] = Counters{} + key1;
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
  }

  // Elements first .. first + count - 1, and up to the end of their group. `first` is a multiple of 4 and the range
  // does not cross a multiple of 2^34 (so that the counter's high word is one number). A function of its own, with the
  // groups inside: what all groups have in common is made once per call.
  __attribute__((noinline)) void fill(int64_t first, int64_t count, float* out) const {
    constexpr int64_t kUnrolled = kChains * kGroup;
    const NormalGenerator own = *this;  // which no store to `out` might change
    int64_t i = 0;
    for (; i + kUnrolled <= count; i += kUnrolled) own.fill_groups<kChains>((first + i) / 4, out + i);
    for (; i < count; i += kGroup) own.fill_groups<1>((first + i) / 4, out + i);
  }

 private:
  // Independent groups in flight: one alone waits for its own latencies (ten dependent multiplies, then a square root).
  static constexpr int kChains = kVectorRegisters == 32 ? 4 : 3;

  template <int kCount>
  __attribute__((always_inline)) void fill_groups(uint64_t block, float* out) const {
    using V = Vec<float>;
    Words radius[kCount], angle[kCount];
    words<kCount>(block, radius, angle);
    V z0[kCount], z1[kCount];
    detail::normal_pairs<kCount>(radius, angle, z0, z1);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      V low, high;
      detail::interleave(z0[i], z1[i], low, high);
      low.store(out + i * kGroup);
      high.store(out + i * kGroup + V::kSize);
    }
  }

  // Words 0 and 2 of each counter go to `radius`, words 1 and 3 to `angle`. Counters stand in the order in which
  // interleave() makes their numbers consecutive: 0, half, 1, half + 1, ...
  template <int kCount>
  void words(uint64_t block, Words* radius, Words* angle) const {
    using detail::merge_high, detail::merge_low, detail::multiply_low, detail::xor3;
    const Counters multiplier0 = Counters{} + kPhiloxMultiplier0, multiplier1 = Counters{} + kPhiloxMultiplier1;
    Counters order;
    for (int lane = 0; lane < kCounterLanes; ++lane) order[lane] = lane / 2 + (lane % 2) * (kCounterLanes / 2);
    Counters c0[kCount], c1[kCount], c2[kCount], c3[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      c0[i] = order + (block + i * kCounterLanes);
      c1[i] = Counters{} + (block >> 32);
      c2[i] = stream_;
      c3[i] = Counters{};
    }
#pragma GCC unroll 16
    for (int round = 0; round < kPhiloxRounds - 1; ++round) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const Counters product0 = multiply_low(c0[i], multiplier0), product1 = multiply_low(c2[i], multiplier1);
        c0[i] = xor3(product1 >> 32, c1[i], keys_[round][0]);
        c1[i] = product1;
        c2[i] = xor3(product0 >> 32, c3[i], keys_[round][1]);
        c3[i] = product0;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Counters product0 = multiply_low(c0[i], multiplier0), product1 = multiply_low(c2[i], multiplier1);
      const Counters high = merge_high(product1, product0);
      radius[i] = reinterpret_cast<Words>(xor3(high, merge_low(c1[i], c3[i]), keys_[kPhiloxRounds - 1][0]));
      angle[i] = reinterpret_cast<Words>(merge_low(product1, product0));
    }
  }

  Counters keys_[kPhiloxRounds][2];
  Counters stream_;
};

}  // namespace leedl
