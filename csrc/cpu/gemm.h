// The register tile that every matrix product of the CPU kernels is made of, and the packing of its operands.
//
// A tile computes kRows x (kVecs * W) elements of C = A . B, W = lanes per vector: one broadcast of A meets kVecs
// vectors of B. B comes in vector panels: panel p holds columns [p * W, (p + 1) * W), one vector after the other for
// each k, so that every tile reads kVecs sequential streams whatever the width of the matrix and may begin at any
// multiple of W.
#pragma once

#include <cstdint>
#include <utility>

#include "simd.h"

namespace leedl {

// The accumulators fill the registers, but for kTileVecs vectors of B and one broadcast of A.
constexpr int64_t kTileVecs = 2;
constexpr int64_t kTileRows = kVectorRegisters == 32 ? 14 : 6;

// The longest sum of products in one accumulator where there is no fma.
constexpr int64_t kTileRun = 128;

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr int64_t round_down(int64_t x, int64_t multiple) { return x / multiple * multiple; }

// Element (row, k) of A lies at a[row * kRowStride + k * kDepthStride]. Constants, so that they become displacements.
template <int64_t kRowStride_, int64_t kDepthStride_>
struct TileLayout {
  static constexpr int64_t kRowStride = kRowStride_;
  static constexpr int64_t kDepthStride = kDepthStride_;
};

// One tile over depth steps from zero; hands every accumulator to epilogue(row, vec, value).
template <int64_t kRows, int64_t kVecs, typename Layout, typename T, typename Epilogue>
inline __attribute__((always_inline)) void tile(int64_t depth, const T* __restrict__ a, const T* __restrict__ b,
                                                int64_t panel_stride, const Epilogue& epilogue) {
  Vec<T> acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
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
#pragma GCC unroll 4
    for (int64_t vec = 0; vec < kVecs; ++vec) columns[vec] = Vec<T>::load(b + vec * panel_stride);
#pragma GCC unroll 16
    for (int64_t row = 0; row < kRows; ++row) {
      const Vec<T> broadcast = Vec<T>::broadcast(a[row * Layout::kRowStride]);
#pragma GCC unroll 4
      for (int64_t vec = 0; vec < kVecs; ++vec) acc[row][vec] = mul_add(broadcast, columns[vec], acc[row][vec]);
    }
    a += Layout::kDepthStride;
    b += Vec<T>::kSize;
  }
#pragma GCC unroll 16
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int64_t vec = 0; vec < kVecs; ++vec) {
      if constexpr (!kHasFma) {
        if (depth > kTileRun) acc[row][vec] = totals[row][vec] + acc[row][vec];
      }
      epilogue(row, vec, acc[row][vec]);
    }
  }
}

// kRows rows of C over all panels of B: epilogue(row, panel, value).
template <int64_t kRows, typename Layout, typename T, typename Epilogue>
inline void tile_rows(int64_t depth, const T* a, const T* b, int64_t panel_stride, int64_t panels,
                      const Epilogue& epilogue) {
  int64_t panel = 0;
  for (; panel + kTileVecs <= panels; panel += kTileVecs) {
    tile<kRows, kTileVecs, Layout>(depth, a, b + panel * panel_stride, panel_stride,
                                   [&](int64_t row, int64_t vec, Vec<T> value) { epilogue(row, panel + vec, value); });
  }
  for (; panel < panels; ++panel) {
    tile<kRows, 1, Layout>(depth, a, b + panel * panel_stride, panel_stride,
                           [&](int64_t row, int64_t, Vec<T> value) { epilogue(row, panel, value); });
  }
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

}  // namespace detail

// B = source^T in panels: source is rows x depth, panel p holds its rows [p * W, (p + 1) * W), W rows for each k <
// depth. Missing rows of the last panel are zeros.
template <typename T>
__attribute__((noinline)) void pack_transposed(T* __restrict__ panels, const T* __restrict__ source, int64_t stride,
                                               int64_t rows, int64_t depth) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t valid = rows - row < kLanes ? rows - row : kLanes;
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int64_t width = depth - k < kLanes ? depth - k : kLanes;
      Vec<T> block[kLanes];
      if (valid == kLanes && width == kLanes) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) block[i] = Vec<T>::load(source + (row + i) * stride + k);
        detail::transpose(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) block[i].store(panels + (k + i) * kLanes);
      } else {
        for (int64_t i = 0; i < kLanes; ++i) {
          block[i] = i < valid ? Vec<T>::load_first(source + (row + i) * stride + k, width) : Vec<T>::zero();
        }
        detail::transpose(block);
        for (int64_t i = 0; i < width; ++i) block[i].store(panels + (k + i) * kLanes);
      }
    }
    panels += depth * kLanes;
  }
}

// B = source in panels: source is rows x columns, panel p holds its columns [p * W, (p + 1) * W), one vector per row.
// Missing columns of the last panel are zeros.
template <typename T, typename Source>
__attribute__((noinline)) void pack_panels(T* __restrict__ panels, int64_t panel_stride,
                                           const Source* __restrict__ source,
                                           int64_t stride, int64_t rows, int64_t columns) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  const int64_t whole = columns / kLanes;
  for (int64_t row = 0; row < rows; ++row) {
    const Source* from = source + row * stride;
    T* to = panels + row * kLanes;
    for (int64_t panel = 0; panel < whole; ++panel)
      Vec<T>::load(from + panel * kLanes).store(to + panel * panel_stride);
    if (whole * kLanes < columns) {
      Vec<T>::load_first(from + whole * kLanes, columns - whole * kLanes).store(to + whole * panel_stride);
    }
  }
}

// A = source * scale, row after row with a constant pitch. Rows from `rows` to kRows are zeros.
template <int64_t kRows, int64_t kPitch, typename T, typename Source>
inline void pack_rows(T* __restrict__ a, const Source* __restrict__ source, int64_t stride, int64_t rows, int64_t columns,
                      T scale) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  const Vec<T> factor = Vec<T>::broadcast(scale);
  for (int64_t row = 0; row < kRows; ++row) {
    T* to = a + row * kPitch;
    const Source* from = source + row * stride;
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t width = columns - column < kLanes ? columns - column : kLanes;
      Vec<T> value = Vec<T>::zero();
      if (row < rows) value = width == kLanes ? Vec<T>::load(from + column) : Vec<T>::load_first(from + column, width);
      (value * factor).store(to + column);
    }
  }
}

}  // namespace leedl
