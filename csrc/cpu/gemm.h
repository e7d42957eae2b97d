// The register tile that every matrix product of the CPU kernels is made of, and the packing of its operands.
//
// A tile computes kRows x (kVecs * W) elements of C = A . B, W = lanes per vector: one broadcast of A meets kVecs
// vectors of B. B comes in vector panels: panel p holds columns [p * W, (p + 1) * W), one vector after the other for
// each k, so that every tile reads kVecs sequential streams whatever the width of the matrix and may begin at any
// multiple of W.
//
// A and B hold float or double, or pairs of bfloat16 numbers: then one step along the depth takes two numbers, elements
// 2k and 2k + 1, and C is float. (An AMX tile of B is 16 vectors of such a panel, as they lie.)
#pragma once

#include <array>
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

namespace detail {

template <typename T, size_t... kLane>
inline void interleave(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high, std::index_sequence<kLane...>) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  using Bits = typename Vec<T>::Bits;
  low.lanes = __builtin_shuffle(a.lanes, b.lanes, Bits{(kLane / 2 + kLane % 2 * kLanes)...});
  high.lanes = __builtin_shuffle(a.lanes, b.lanes, Bits{(kLane / 2 + kLane % 2 * kLanes + kLanes / 2)...});
}

// Transposes W rows of W lanes. Each round interleaves the upper half of the rows with the lower half, which rotates
// the bits of an element's (row, lane) number by one; log2(W) rounds exchange row and lane.
template <typename T>
inline __attribute__((always_inline)) void transpose(Vec<T>* rows) {
  constexpr int64_t kLanes = Vec<T>::kSize;
#pragma GCC unroll 4
  for (int64_t round = 1; round < kLanes; round *= 2) {
    Vec<T> mixed[kLanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      interleave(rows[i], rows[i + kLanes / 2], mixed[2 * i], mixed[2 * i + 1], std::make_index_sequence<kLanes>());
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = mixed[i];
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

// A copy of the rows that one panel is made of. Transposing them where they are reads all of them side by side, which
// processors do not foresee; the copy reads one after the other, at the speed of memory.
template <typename Stored, int64_t kRows>
class NearRows {
 public:
  static constexpr int64_t kMaxDepth = 256;

  // `depth` numbers of kRows rows, or the rows themselves where they are longer than kMaxDepth.
  NearRows(const Stored* source, int64_t stride, int64_t depth)
      : rows_(depth <= kMaxDepth ? copy_ : source), stride_(depth <= kMaxDepth ? kPitch : stride) {
    if (depth > kMaxDepth) return;
    for (int64_t row = 0; row < kRows; ++row) {
      std::memcpy(copy_ + row * kPitch, source + row * stride, depth * sizeof(Stored));
    }
  }
  const Stored* at(int64_t row, int64_t k) const { return rows_ + row * stride_ + k; }
  int64_t stride_bytes() const { return stride_ * static_cast<int64_t>(sizeof(Stored)); }

 private:
  static constexpr int64_t kPitch = kMaxDepth + 64 / static_cast<int64_t>(sizeof(Stored));

  alignas(64) Stored copy_[kRows * kPitch];
  const Stored* const rows_;
  const int64_t stride_;
};

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

// B = source^T in panels: source is rows x depth, panel p holds its rows [p * W, (p + 1) * W), W rows for each k <
// depth. Missing rows of the last panel are zeros.
template <typename T, typename Stored>
__attribute__((noinline)) void pack_transposed(T* __restrict__ panels, const Stored* __restrict__ source,
                                               int64_t stride, int64_t rows, int64_t depth) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t valid = rows - row < kLanes ? rows - row : kLanes;
    int64_t k = 0;
    if (valid == kLanes) {
      const detail::NearRows<Stored, kLanes> near(source + row * stride, stride, depth);
      for (; k + kLanes <= depth; k += kLanes) {
#if defined(__AVX512F__)
        if constexpr (std::is_same_v<Stored, float>) {
          detail::transpose(near.at(0, k), near.stride_bytes(), panels + k * kLanes);
          continue;
        }
#endif
        Vec<T> block[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) block[i] = Vec<T>::load(near.at(i, k));
        detail::transpose(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) block[i].store(panels + (k + i) * kLanes);
      }
    }
    for (; k < depth; k += kLanes) {
      const int64_t width = depth - k < kLanes ? depth - k : kLanes;
      Vec<T> block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = i < valid ? Vec<T>::load_first(source + (row + i) * stride + k, width) : Vec<T>::zero();
      }
      detail::transpose(block);
      for (int64_t i = 0; i < width; ++i) block[i].store(panels + (k + i) * kLanes);
    }
    panels += depth * kLanes;
  }
}

// B = source in panels: source is rows x columns, panel p holds its columns [p * W, (p + 1) * W), one vector per row.
// Missing columns of the last panel are zeros.
template <typename T, typename Stored>
__attribute__((noinline)) void pack_panels(T* __restrict__ panels, int64_t panel_stride,
                                           const Stored* __restrict__ source, int64_t stride, int64_t rows,
                                           int64_t columns) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  const int64_t whole = columns / kLanes;
  for (int64_t row = 0; row < rows; ++row) {
    const Stored* from = source + row * stride;
    T* to = panels + row * kLanes;
    for (int64_t panel = 0; panel < whole; ++panel)
      Vec<T>::load(from + panel * kLanes).store(to + panel * panel_stride);
    if (whole * kLanes < columns) {
      Vec<T>::load_first(from + whole * kLanes, columns - whole * kLanes).store(to + whole * panel_stride);
    }
  }
}

// A = source * scale, row after row with a constant pitch. Rows from `rows` to kRows are zeros.
template <int64_t kRows, int64_t kPitch, typename E, typename Stored>
inline void pack_rows(E* __restrict__ a, const Stored* __restrict__ source, int64_t stride, int64_t rows,
                      int64_t columns, typename Operand<E>::Sum scale) {
  using T = typename Operand<E>::Sum;
  using To = std::conditional_t<std::is_same_v<E, BFloat16Pair>, BFloat16, E>;  // pairs lie one after another
  constexpr int64_t kLanes = Vec<T>::kSize;
  const Vec<T> factor = Vec<T>::broadcast(scale);
  for (int64_t row = 0; row < kRows; ++row) {
    To* to = reinterpret_cast<To*>(a + row * kPitch);
    const Stored* from = source + row * stride;
    if (std::is_same_v<To, Stored> && scale == 1 && row < rows) {
      const int64_t padded = round_up(columns, kLanes);
      std::memcpy(to, from, columns * sizeof(To));
      std::memset(to + columns, 0, (padded - columns) * sizeof(To));
      continue;
    }
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t width = columns - column < kLanes ? columns - column : kLanes;
      Vec<T> value = Vec<T>::zero();
      if (row < rows) value = width == kLanes ? Vec<T>::load(from + column) : Vec<T>::load_first(from + column, width);
      (value * factor).store(to + column);
    }
  }
}

#if defined(__AVX512F__)

namespace detail {

inline __m512i first_halves(const BFloat16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p);
}

// Number i of the first half of a vector, then number i of its second half.
template <size_t... kWord>
constexpr std::array<uint16_t, sizeof...(kWord)> interleaved_halves(std::index_sequence<kWord...>) {
  return {static_cast<uint16_t>(kWord / 2 + kWord % 2 * (sizeof...(kWord) / 2))...};
}

}  // namespace detail

// pack_transposed for pairs: `depth` counts numbers, panels have `pairs` vectors, which are zeros beyond the depth: as
// many as the depth needs, or the next multiple of W.
__attribute__((noinline)) inline void pack_transposed(BFloat16Pair* __restrict__ panels,
                                                      const BFloat16* __restrict__ source, int64_t stride,
                                                      int64_t rows, int64_t depth, int64_t pairs) {
  constexpr int64_t kLanes = Vec<float>::kSize;
  for (int64_t row = 0; row < rows; row += kLanes) {
    int64_t k = 0;
    if (row + kLanes <= rows) {
      const detail::NearRows<BFloat16, kLanes> near(source + row * stride, stride, depth);
      for (; 2 * (k + kLanes) <= depth; k += kLanes) {
        detail::transpose(near.at(0, 2 * k), near.stride_bytes(), reinterpret_cast<float*>(panels + k * kLanes));
      }
    }
    for (; k < pairs; k += kLanes) {
      Vec<float> block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const BFloat16* from = source + (row + i) * stride + 2 * k;
        block[i] = row + i < rows ? Vec<float>{_mm512_castsi512_ps(detail::first_halves(from, depth - 2 * k))}
                                  : Vec<float>::zero();
      }
      detail::transpose(block);
      const int64_t width = pairs - k < kLanes ? pairs - k : kLanes;
      for (int64_t i = 0; i < width; ++i) std::memcpy(panels + (k + i) * kLanes, &block[i], sizeof block[i]);
    }
    panels += pairs * kLanes;
  }
}

inline void pack_transposed(BFloat16Pair* panels, const BFloat16* source, int64_t stride, int64_t rows, int64_t depth) {
  pack_transposed(panels, source, stride, rows, depth, depth_of<BFloat16Pair>(depth));
}

// pack_panels for pairs: one vector for every two rows of the source, the last with zeros if it has a row too few.
__attribute__((noinline)) inline void pack_panels(BFloat16Pair* __restrict__ panels, int64_t panel_stride,
                                                  const BFloat16* __restrict__ source, int64_t stride, int64_t rows,
                                                  int64_t columns) {
  constexpr int64_t kLanes = Vec<float>::kSize;
  for (int64_t row = 0; row < rows; row += 2) {
    const BFloat16* from = source + row * stride;
    BFloat16Pair* to = panels + row / 2 * kLanes;
    for (int64_t column = 0; column < columns; column += kLanes, to += panel_stride) {
      const auto mask = static_cast<__mmask16>(columns - column >= kLanes ? 0xffff : (1 << (columns - column)) - 1);
      const auto second_mask = row + 1 < rows ? mask : __mmask16(0);
      const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + column));
      const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second_mask, from + stride + column));
      const __m512i pairs = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
      std::memcpy(to, &pairs, sizeof pairs);
    }
  }
}

// 2 W numbers rounded to pairs of neighbours: those of `first`, then those of `second`.
inline void store_pairs(BFloat16Pair* to, Vec<float> first, Vec<float> second) {
  const Vec<float> pairs = Operand<BFloat16Pair>::pack(first, second);
  std::memcpy(to, &pairs, sizeof pairs);
}

// W pairs of one number of each vector.
inline void store_columns(BFloat16Pair* to, Vec<float> first, Vec<float> second) {
  alignas(64) static constexpr auto kOrder = detail::interleaved_halves(std::make_index_sequence<2 * Vec<float>::kSize>());
  const __m512i halves = _mm512_castps_si512(Operand<BFloat16Pair>::pack(first, second).lanes);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder.data()), halves));
}

// `columns` numbers, a multiple of W, rounded to pairs of neighbours.
inline void pack_row(BFloat16Pair* __restrict__ a, const float* __restrict__ source, int64_t columns) {
  constexpr int64_t kLanes = Vec<float>::kSize;
  for (int64_t column = 0; column < columns; column += 2 * kLanes) {
    const bool last = column + kLanes == columns;
    const Vec<float> second = last ? Vec<float>::zero() : Vec<float>::load(source + column + kLanes);
    store_pairs(a + column / 2, Vec<float>::load(source + column), second);
  }
}

// Two rows of `columns` numbers each, a multiple of W, rounded to pairs of one number of each row.
inline void pack_columns(BFloat16Pair* __restrict__ a, const float* __restrict__ first, const float* __restrict__ second,
                         int64_t columns) {
  constexpr int64_t kLanes = Vec<float>::kSize;
  for (int64_t column = 0; column < columns; column += kLanes) {
    store_columns(a + column, Vec<float>::load(first + column), Vec<float>::load(second + column));
  }
}

#endif

}  // namespace leedl
