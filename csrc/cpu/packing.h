// The packing of the operands of matrix products, for the tiles of gemm.h and of amx.h.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "gemm.h"
#include "transpose.h"

namespace leedl {

namespace detail {

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

// W pairs of a number of one row and of the next, zeros beyond `columns` columns and `rows` rows.
inline Vec<float> paired_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t columns) {
  const auto mask = static_cast<__mmask16>(columns >= Vec<float>::kSize ? 0xffff : (1 << columns) - 1);
  const auto row = [&](int64_t i) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows > i ? mask : __mmask16(0), from + i * stride));
  };
  return {_mm512_castsi512_ps(_mm512_or_si512(row(0), _mm512_slli_epi32(row(1), 16)))};
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
      const Vec<float> pairs = detail::paired_rows(from + column, stride, rows - row, columns - column);
      std::memcpy(to, &pairs, sizeof pairs);
    }
  }
}

// A = source^T as rows of pairs, `pitch` of them apart: a row for each column of the source, rounded up to W of them, a
// pair for every two of its rows, rounded up to W pairs; zeros where the source has no more.
__attribute__((noinline)) inline void pack_columns_as_rows(BFloat16Pair* __restrict__ a, int64_t pitch,
                                                           const BFloat16* __restrict__ source, int64_t stride,
                                                           int64_t rows, int64_t columns) {
  constexpr int64_t kLanes = Vec<float>::kSize;
  for (int64_t row = 0; row < rows; row += 2 * kLanes) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      const BFloat16* from = source + row * stride + column;
      Vec<float> block[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = detail::paired_rows(from + 2 * i * stride, stride, rows - row - 2 * i, columns - column);
      }
      detail::transpose(block);
      for (int64_t i = 0; i < kLanes; ++i) {
        std::memcpy(a + (column + i) * pitch + row / 2, &block[i], sizeof block[i]);
      }
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
