// Tiles of rows in shared memory, how they get there and back, and the two products that attention is made of.
//
// A tile's row is a line of 16-byte chunks. The tensor cores take their operands in matrices of 8 rows by one chunk; were
// a tile stored as it is, these 8 chunks would lie in the same banks of shared memory, and take turns. So chunk c of row
// r is stored at place c ^ (r % 8) of the row: 8 rows of any chunk, and the 8 chunks that 8 threads store, then lie in
// all 32 banks. (Rows of 4 chunks lie in pairs; there the pair's number takes the place of the row's.)
#pragma once

#include "attention_arguments.h"
#include "instructions.h"
#include "matrix_instructions.h"
#include "numbers.h"
#include "reductions.h"

namespace leedl {

constexpr int kChunk = 8;  // numbers of two bytes in 16

// What a warp has of a matrix of 16 kRowTiles rows and kColumns columns: C fragments, see matrix_instructions.h.
template <int kRowTiles, int kColumns>
using Fragments = float[kRowTiles][kColumns / 8][4];

// Where a lane is in its fragments.
struct Lane {
  int warp = threadIdx.x / kWarpSize;
  int lane = threadIdx.x % kWarpSize;
  int group = lane / 4;   // its rows: `group` and group + 8 of each tile of 16
  int member = lane % 4;  // its columns: 2 member and the next of each tile of 8
};

// Rows of kDim numbers of T in shared memory.
template <typename T, int kDim>
struct Tile {
  static constexpr int kChunks = kDim / kChunk;
  static constexpr int kPeriod = kChunks < 8 ? kChunks : 8;  // places among which a row's chunks change
  static constexpr int kRowsPerLine = 8 / kPeriod;           // of 128 bytes, all banks

  T* data;

  static constexpr int bytes(int rows) { return rows * kDim * static_cast<int>(sizeof(T)); }

  // Chunk `even` + `chunk` of row `first` + `row`. `first` is a multiple of 8 and `even` an even number known to the
  // compiler, so that one xor of what a lane keeps finds its place.
  __device__ __forceinline__ T* at(int first, int row, int even, int chunk) const {
    const int own = chunk ^ (row / kRowsPerLine % kPeriod);
    return data + (first + row) * kDim + even / kPeriod * kPeriod * kChunk + (even % kPeriod ^ own) * kChunk;
  }
  __device__ __forceinline__ T* at(int row, int chunk) const {
    return data + row * kDim + (chunk ^ (row / kRowsPerLine % kPeriod)) * kChunk;
  }

  // A of a product along the columns: 16 rows from `first` on, 16 columns from 8 `even` on.
  __device__ __forceinline__ void load_a(int first, int even, const Lane& l, uint32_t (&a)[4]) const {
    load_matrices(at(first, l.lane % 16, even, l.lane / 16), a);
  }
  // B of a product along the columns, for 16 rows from `first` on: two pairs for 8 of them each.
  __device__ __forceinline__ void load_b(int first, int even, const Lane& l, uint32_t (&b)[4]) const {
    load_matrices(at(first, l.lane % 8 + l.lane / 16 * 8, even, l.lane / 8 % 2), b);
  }
  // B of a product along the rows, 16 from `first` on, for 16 columns from 8 `even` on: two pairs for 8 of them each.
  __device__ __forceinline__ void load_b_transposed(int first, int even, const Lane& l, uint32_t (&b)[4]) const {
    load_matrices_transposed(at(first, l.lane % 16, even, l.lane / 16), b);
  }
};

// Begins to copy kRows rows, `columns` numbers each; the rows from `rows` on, and the rest of each, become zeros.
template <int kRows, int kThreads, typename T, int kDim>
__device__ __forceinline__ void begin_copy(Tile<T, kDim> to, const T* from, int64_t stride, int rows, int columns) {
  constexpr int kChunks = kDim / kChunk, kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kRowsAtOnce == 0);
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  const int bytes = 2 * min(max(columns - kChunk * chunk, 0), kChunk);
  const int existing = rows - first;
  const T* row = from + first * stride + kChunk * chunk;
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtOnce) {
    begin_copy_16(to.at(first + i, chunk), row, i < existing ? bytes : 0);
    row += kRowsAtOnce * stride;
  }
}

// scores = own stream^T: rows `first` on of `own` by all rows of `stream`, along their columns.
template <int kRowTiles, int kColumns, typename T, int kDim>
__device__ __forceinline__ void multiply_rows(Fragments<kRowTiles, kColumns>& scores, Tile<T, kDim> own, int first,
                                              Tile<T, kDim> stream, const Lane& l) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
    }
  }
#pragma unroll
  for (int even = 0; even < kDim / kChunk; even += 2) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) own.load_a(first + 16 * m, even, l, a[m]);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t b[4];
      stream.load_b(8 * n, even, l, b);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply_add<T>(scores[m][n], a[m], b[0], b[1]);
        multiply_add<T>(scores[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// sums += weights stream: weights, rounded to T, by the rows of `stream`.
template <int kRowTiles, int kColumns, typename T, int kDim>
__device__ __forceinline__ void add_weighted_rows(Fragments<kRowTiles, kDim>& sums,
                                                  const Fragments<kRowTiles, kColumns>& weights, Tile<T, kDim> stream,
                                                  const Lane& l) {
#pragma unroll
  for (int k = 0; k < kColumns / 8; k += 2) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[m][i] = pair_of<T>(weights[m][k + i / 2][i % 2 * 2], weights[m][k + i / 2][i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int even = 0; even < kDim / kChunk; even += 2) {
      uint32_t b[4];
      stream.load_b_transposed(8 * k, even, l, b);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply_add<T>(sums[m][even], a[m], b[0], b[1]);
        multiply_add<T>(sums[m][even + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Stores a warp's sums, times factor(row tile, half), through its own rows `first` on of `tile`, which nobody else reads
// any more: from fragments to whole chunks. `to` is the row of `first`, the first of `rows` that exist.
template <int kRowTiles, typename T, int kDim, typename Factor>
__device__ __forceinline__ void store_rows(const Fragments<kRowTiles, kDim>& sums, const Factor& factor,
                                           Tile<T, kDim> tile, int first, T* to, int64_t stride, int rows,
                                           int columns, bool is_aligned, const Lane& l) {
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float times = factor(m, half);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const uint32_t pair = pair_of<T>(sums[m][n][2 * half] * times, sums[m][n][2 * half + 1] * times);
        T* const place = tile.at(first + 16 * m, l.group + 8 * half, n / 2 * 2, n % 2) + 2 * l.member;
        *reinterpret_cast<uint32_t*>(place) = pair;
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kDim / kChunk, kRowsAtOnce = kWarpSize / kChunks;
  const int chunk = l.lane % kChunks, count = columns - kChunk * chunk;
  for (int row = l.lane / kChunks; row < 16 * kRowTiles && row < rows; row += kRowsAtOnce) {
    const T* const from = tile.at(first + row, chunk);
    T* const place = to + row * stride + kChunk * chunk;
    if (is_aligned && count >= kChunk) {
      store_vector(place, load_vector(from));
    } else {
      for (int i = 0; i < min(count, kChunk); ++i) place[i] = from[i];
    }
  }
}

}  // namespace leedl
