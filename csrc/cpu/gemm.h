// The register tile that every matrix product of the CPU kernels is made of; packing.h makes its operands.
//
// A tile computes kRows x (kVecs * W) elements of C = A . B, W = lanes per vector: one broadcast of A meets kVecs
// vectors of B. B comes in vector panels: panel p holds columns [p * W, (p + 1) * W), one vector after the other for
// each k, so that every tile reads kVecs sequential streams whatever the width of the matrix and may begin at any
// multiple of W.
//
// A and B hold float or double, or pairs of bfloat16 numbers: then one step along the depth takes two numbers, elements
// 2k and 2k + 1, and C is float. (An AMX tile of B is 16 vectors of such a panel, as they lie.)
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.h"

namespace leedl {

// The accumulators fill the registers, but for kTileVecs vectors of B and one broadcast of A.
constexpr int64_t kTileVecs = 2;
constexpr int64_t kTileRows = kVectorRegisters == 32 ? 14 : 6;

// The longest sum of products in one accumulator where there is no fma.
constexpr int64_t kTileRun = 32;

constexpr int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }
constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr int64_t round_down(int64_t x, int64_t multiple) { return x / multiple * multiple; }

struct BFloat16Pair {
  uint16_t bits[2];
};

// How a tile multiplies elements of type E: Sum is what it adds up in, kDepth how many numbers along the depth one
// element holds.
template <typename E>
struct Operand {
  using Sum = E;
  static constexpr int64_t kDepth = 1;
  static Vec<E> load(const E* p) { return Vec<E>::load(p); }
  static Vec<E> broadcast(const E* p) { return Vec<E>::broadcast(*p); }
  static Vec<E> multiply_add(Vec<E> a, Vec<E> b, Vec<E> c) { return mul_add(a, b, c); }
};

#if defined(__AVX512F__)
constexpr bool kHasPairs = true;

// The lanes are bits, not numbers. Assembly, since this module is compiled for processors without these instructions
// too: whoever multiplies pairs has asked can_multiply_pairs() first.
template <>
struct Operand<BFloat16Pair> {
  using Sum = float;
  static constexpr int64_t kDepth = 2;
  static Vec<float> load(const BFloat16Pair* p) {
    Vec<float> bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
  }
  static Vec<float> broadcast(const BFloat16Pair* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return {_mm512_castsi512_ps(_mm512_set1_epi32(bits))};
  }
  // c + a[2k] * b[2k] + a[2k + 1] * b[2k + 1]; subnormal numbers count as 0.
  static Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c.lanes) : "v"(a.lanes), "v"(b.lanes));
    return c;
  }
  // 2 W numbers, rounded to nearest even, as W pairs.
  static Vec<float> pack(Vec<float> first, Vec<float> second) {
    Vec<float> pairs;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs.lanes) : "v"(first.lanes), "v"(second.lanes));
    return pairs;
  }
};

inline bool can_multiply_pairs() { return __builtin_cpu_supports("avx512bf16"); }
#else
constexpr bool kHasPairs = false;
#endif

// Elements of type E that hold `count` numbers along the depth.
template <typename E>
constexpr int64_t depth_of(int64_t count) {
  return (count + Operand<E>::kDepth - 1) / Operand<E>::kDepth;
}

// Element (row, k) of A lies at a[row * kRowStride + k * kDepthStride]. Constants, so that they become displacements.
template <int64_t kRowStride_, int64_t kDepthStride_>
struct TileLayout {
  static constexpr int64_t kRowStride = kRowStride_;
  static constexpr int64_t kDepthStride = kDepthStride_;
};

// One tile over depth steps from zero; hands every accumulator to epilogue(row, vec, value).
template <int64_t kRows, int64_t kVecs, typename Layout, typename E, typename Epilogue>
inline __attribute__((always_inline)) void tile(int64_t depth, const E* __restrict__ a, const E* __restrict__ b,
                                                int64_t panel_stride, const Epilogue& epilogue) {
  using T = typename Operand<E>::Sum;
  Vec<T> acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int64_t vec = 0; vec < kVecs; ++vec) acc[row][vec] = Vec<T>::zero();
  }
  [[maybe_unused]] Vec<T> totals[kRows][kVecs] = {};
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (!kHasFma) {  // each product is rounded too: sums in runs make up for it
      if (k > 0 && k % kTileRun == 0) {
        for (int64_t row = 0; row < kRows; ++row) {
          for (int64_t vec = 0; vec < kVecs; ++vec) {
            totals[row][vec] = totals[row][vec] + acc[row][vec];
            acc[row][vec] = Vec<T>::zero();
          }
        }
      }
    }
    Vec<T> columns[kVecs];
#pragma GCC unroll 8
    for (int64_t vec = 0; vec < kVecs; ++vec) columns[vec] = Operand<E>::load(b + vec * panel_stride);
#pragma GCC unroll 16
    for (int64_t row = 0; row < kRows; ++row) {
      const Vec<T> broadcast = Operand<E>::broadcast(a + row * Layout::kRowStride);
#pragma GCC unroll 8
      for (int64_t vec = 0; vec < kVecs; ++vec) {
        acc[row][vec] = Operand<E>::multiply_add(broadcast, columns[vec], acc[row][vec]);
      }
    }
    a += Layout::kDepthStride;
    b += Vec<T>::kSize;
  }
#pragma GCC unroll 16
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int64_t vec = 0; vec < kVecs; ++vec) {
      if constexpr (!kHasFma) {
        if (depth > kTileRun) acc[row][vec] = totals[row][vec] + acc[row][vec];
      }
      epilogue(row, vec, acc[row][vec]);
    }
  }
}

// kRows rows of C over all panels of B: epilogue(row, panel, value). Tiles of three vectors leave two rather than one to
// the last tiles. What the epilogue captures by value stays in registers; what it captures by reference is read again
// for each vector, since its own stores might have changed it.
template <int64_t kRows, typename Layout, int64_t kVecs = kTileVecs, typename E, typename Epilogue>
inline void tile_rows(int64_t depth, const E* a, const E* b, int64_t panel_stride, int64_t panels,
                      Epilogue epilogue) {
  using T = typename Operand<E>::Sum;
  int64_t panel = 0;
  const auto take = [&](auto vecs) __attribute__((always_inline)) {
    tile<kRows, vecs, Layout>(depth, a, b + panel * panel_stride, panel_stride,
                              [&](int64_t row, int64_t vec, Vec<T> value) { epilogue(row, panel + vec, value); });
    panel += vecs;
  };
  while (panel + kVecs <= panels && !(kVecs == 3 && panel + 4 == panels)) {
    take(std::integral_constant<int64_t, kVecs>());
  }
  if constexpr (kVecs == 3) {
    while (panel + 2 <= panels) take(std::integral_constant<int64_t, 2>());
  }
  while (panel < panels) take(std::integral_constant<int64_t, 1>());
}

}  // namespace leedl
