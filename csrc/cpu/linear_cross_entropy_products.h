// linear_cross_entropy.cpp: the two ways to make its products, on vectors (gemm.h) and on AMX (amx.h). Either multiplies
// and hands each vector of sums on: epilogue(row, panel, sums). What the epilogue captures should be captured by value;
// see tile_rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "amx.h"
#include "packing.h"

namespace leedl {

constexpr int64_t kChunkRows = kTileRows == 14 ? 224 : 240;
constexpr int64_t kDepth = 256;
constexpr int64_t kPitch = kDepth + 16;  // of packed weights: an odd number of cache lines, to spread over the sets
static_assert(kChunkRows % kTileRows == 0 && kChunkRows % (kVectorBytes / 4) == 0 && kChunkRows % 2 == 0);

// Calls body(height) with the lowest tile of at least `rows` rows: rows that are missing cost as much as others.
template <typename Body>
inline void with_tile_height(int64_t rows, const Body& body) {
  constexpr int64_t kQuarter = divide_up(kTileRows, 4);
  if (rows <= kQuarter) {
    body(std::integral_constant<int64_t, kQuarter>());
  } else if (rows <= 2 * kQuarter) {
    body(std::integral_constant<int64_t, 2 * kQuarter>());
  } else {
    body(std::integral_constant<int64_t, kTileRows>());
  }
}

// The logits' gradient of a block, [classes][kChunkRows], rounded.
template <typename E, typename T>
inline void round_rows(E* to, const T* dlogits, int64_t classes, int64_t columns) {
  for (int64_t i = 0; i < classes; ++i) {
    pack_row(to + i * depth_of<E>(kChunkRows), dlogits + i * kChunkRows, columns);
  }
}

// On vectors. E is what the operands hold, T what is summed; see Operand.
template <typename E_>
struct VectorProducts {
  using E = E_;
  using T = typename Operand<E>::Sum;
  static constexpr bool kOnAmx = false;
  static constexpr int64_t kLanes = Vec<T>::kSize;
  static constexpr int64_t kBlockClasses = kTileRows == 14 ? 112 : 102;
  static constexpr int64_t kStripRows = kTileRows;  // of the left operand that meet the right one together
  static_assert(kBlockClasses % kStripRows == 0);

  // Elements of an operand that hold `count` numbers along the depth.
  static constexpr int64_t depth(int64_t count) { return depth_of<E>(count); }

  // The logits' gradient, [classes][kChunkRows], read column by column.
  using Columns = TileLayout<1, kChunkRows>;

  // Rounds dlogits of `classes` classes and `columns` rows of the chunk, a multiple of W: as they lie, and to Columns.
  static void round(E* rows, E* columns_of_rows, const T* dlogits, int64_t classes, int64_t columns) {
    static constexpr T kZeros[kChunkRows] = {};
    round_rows(rows, dlogits, classes, columns);
    for (int64_t i = 0; i < classes; i += 2) {
      const T* const second = i + 1 < classes ? dlogits + (i + 1) * kChunkRows : kZeros;
      pack_columns(columns_of_rows + i / 2 * kChunkRows, dlogits + i * kChunkRows, second, columns);
    }
  }

  // A . B for `rows` rows of A. The epilogue gets the rows of whole tiles.
  template <typename Layout, typename Epilogue>
  static void multiply(int64_t rows, int64_t depth, const E* a, const E* b, int64_t panel_stride, int64_t panels,
                       const Epilogue& epilogue) {
    for (int64_t strip = 0; strip < rows; strip += kStripRows) {
      with_tile_height(rows - strip, [&](auto height) {
        tile_rows<height(), Layout>(
            depth, a + strip * Layout::kRowStride, b, panel_stride, panels,
            [strip, epilogue](int64_t row, int64_t panel, Vec<T> sums) { epilogue(strip + row, panel, sums); });
      });
    }
  }
};

#if defined(__AVX512F__)

// On AMX: the depth goes on over zeros to whole tiles, and sums come by way of memory.
struct AmxProducts {
  using E = BFloat16Pair;
  using T = float;
  static constexpr bool kOnAmx = true;
  static constexpr int64_t kLanes = kTileSize;
  static constexpr int64_t kBlockClasses = 128;
  static constexpr int64_t kStripRows = 2 * kTileSize;
  static_assert(Vec<T>::kSize == kTileSize);
  static_assert(kBlockClasses % kStripRows == 0 && kChunkRows % kStripRows == 0 && kDepth % kStripRows == 0);

  static constexpr int64_t depth(int64_t count) { return round_up(depth_of<E>(count), kTileSize); }

  // The logits' gradient, transposed: the left operand's pairs lie along the depth.
  using Columns = TileLayout<depth_of<E>(kBlockClasses), 1>;

  static void round(E* rows, E* columns_of_rows, const T* dlogits, int64_t classes, int64_t columns) {
    round_rows(rows, dlogits, classes, columns);
    pack_columns_as_rows(columns_of_rows, Columns::kRowStride, reinterpret_cast<const BFloat16*>(rows), kChunkRows,
                         classes, columns);
  }

  template <typename Layout, typename Epilogue>
  static void multiply(int64_t rows, int64_t depth, const E* a, const E* b, int64_t panel_stride, int64_t panels,
                       const Epilogue& epilogue) {
    static_assert(Layout::kDepthStride == 1);
    alignas(64) T sums[kStripRows * kPitch];  // at most kDepth of a row
    for (int64_t strip = 0; strip < rows; strip += kStripRows) {
      const int64_t height = std::min(kStripRows, rows - strip);
      multiply_on_amx(height, depth, {a + strip * Layout::kRowStride, Layout::kRowStride},
                      {b, panel_stride, kTileSize}, panels, false, {sums, kPitch});
      for (int64_t row = 0; row < height; ++row) {
        for (int64_t panel = 0; panel < panels; ++panel) {
          epilogue(strip + row, panel, Vec<T>::load(sums + row * kPitch + panel * kTileSize));
        }
      }
    }
  }
};

#endif

}  // namespace leedl
