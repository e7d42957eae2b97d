// Transposing what lies in vector registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "simd.h"

namespace leedl {

namespace detail {

template <typename T, size_t... kLane>
inline void interleave(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high, std::index_sequence<kLane...>) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  using Bits = typename Vec<T>::Bits;
  low.lanes = __builtin_shuffle(a.lanes, b.lanes, Bits{(kLane / 2 + kLane % 2 * kLanes)...});
  high.lanes = __builtin_shuffle(a.lanes, b.lanes, Bits{(kLane / 2 + kLane % 2 * kLanes + kLanes / 2)...});
}

// Transposes W rows of W lanes. Each round interleaves the upper half of the rows with the lower half, which rotates
// the bits of an element's (row, lane) number by one; log2(W) rounds exchange row and lane. W / 2 vectors that hold W
// rows of W / 2 elements, two in each, become W / 2 rows of W lanes by as many rounds.
template <typename T, int64_t kVecs = Vec<T>::kSize>
inline __attribute__((always_inline)) void transpose(Vec<T>* rows) {
  constexpr int64_t kLanes = Vec<T>::kSize;
#pragma GCC unroll 4
  for (int64_t round = 1; round < kLanes; round *= 2) {
    Vec<T> mixed[kVecs];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kVecs / 2; ++i) {
      interleave(rows[i], rows[i + kVecs / 2], mixed[2 * i], mixed[2 * i + 1], std::make_index_sequence<kLanes>());
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kVecs; ++i) rows[i] = mixed[i];
  }
}

#if defined(__AVX512F__)

// Transposes 16 rows of 16 four-byte elements, a row every `stride` bytes, on their way from memory to `to`: quarters of
// rows are loaded where they belong, which leaves 4 x 4 elements in each of them to transpose.
inline __attribute__((always_inline)) void transpose(const void* source, int64_t stride, float* to) {
  const auto* from = static_cast<const std::byte*>(source);
#pragma GCC unroll 4
  for (int64_t quarter = 0; quarter < 4; ++quarter) {
    __m512 rows[4];
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      const auto load = [&](int64_t row) {
        return _mm_loadu_ps(reinterpret_cast<const float*>(from + row * stride + quarter * 16));
      };
      rows[i] = _mm512_maskz_broadcast_f32x4(0x000f, load(i));
      rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0x00f0, load(i + 4));
      rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0x0f00, load(i + 8));
      rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0xf000, load(i + 12));
    }
    const auto low = [](__m512 a, __m512 b) { return _mm512_castps_pd(_mm512_unpacklo_ps(a, b)); };
    const auto high = [](__m512 a, __m512 b) { return _mm512_castps_pd(_mm512_unpackhi_ps(a, b)); };
    const __m512d low0 = low(rows[0], rows[1]), low1 = low(rows[2], rows[3]);
    const __m512d high0 = high(rows[0], rows[1]), high1 = high(rows[2], rows[3]);
    _mm512_storeu_ps(to, _mm512_castpd_ps(_mm512_unpacklo_pd(low0, low1)));
    _mm512_storeu_ps(to + 16, _mm512_castpd_ps(_mm512_unpackhi_pd(low0, low1)));
    _mm512_storeu_ps(to + 32, _mm512_castpd_ps(_mm512_unpacklo_pd(high0, high1)));
    _mm512_storeu_ps(to + 48, _mm512_castpd_ps(_mm512_unpackhi_pd(high0, high1)));
    to += 64;
  }
}

#endif

}  // namespace detail

// Lane i is the sum of all lanes of vectors[i], by the same tree as that of one vector; `vectors` is overwritten.
template <typename T>
inline __attribute__((always_inline)) Vec<T> reduce_add(Vec<T> (&vectors)[Vec<T>::kSize]) {
  constexpr int64_t kLanes = Vec<T>::kSize;
#pragma GCC unroll 4
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) {
      Vec<T> low, high;
      detail::interleave(vectors[i], vectors[i + half], low, high, std::make_index_sequence<kLanes>());
      vectors[i] = low + high;
    }
  }
  return vectors[0];
}

}  // namespace leedl
