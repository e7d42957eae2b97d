// What one call of attention hands to each of its kernels, and which tiles a block works on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "attention_tiles.h"
#include "entry_points.h"
#include "runtime.h"

namespace leedl {

// A (batch, num_heads, rows, columns) tensor with a contiguous last dimension.
template <typename T>
struct Heads {
  T* data;
  int64_t stride_b, stride_h, stride_m;

  __device__ __forceinline__ T* row(int batch, int head, int64_t row) const {
    return data + batch * stride_b + head * stride_h + row * stride_m;
  }
};

// Positions in a sequence are below kMaxSeqlen, which leaves room in an int for sums of them and a window's side.
constexpr int kMaxSeqlen = 1 << 29;
using Window = AttentionWindowOf<int>;

// (batch, num_heads, seqlen_q), all null unless they are wanted.
struct AttentionStatistics {
  float* lse;
  float* base;         // of the row's powers of two: its largest exponent
  float* inverse_sum;  // 1 / the sum of these powers relative to the base
};

// Sizes, options and the smaller tensors, which may be null. A score is q . k, times `score_scale` and less the slope's
// part where `changes_scores`; score * factor is the exponent of a power of two.
struct AttentionCall {
  int num_heads, group, head_dim, head_dim_v, num_sequences;
  int seqlen_q, seqlen_k, window_left, window_right;
  float factor, score_scale, softmax_scale;
  bool changes_scores;
  const float* sinks;
  const float* alibi_slopes;
  int64_t alibi_stride_b;
  const int64_t* key_lengths;
  const int64_t* cu_seqlens_q;
  const int64_t* cu_seqlens_k;
};

// Where a block works: rows from `first` on of one sequence, of one head.
struct Place {
  int batch, head;
  int sample;                  // the number of the sequence, which is the batch unless sequences are packed
  int first;                   // of the block's own rows
  int first_query, first_key;  // where the sequence begins in its pack
  int seqlen_k;                // and that of its queries is the window's
  Window window;
};

// [begin, end), and within it [inner_begin, inner_end), where all of one side see all of the other.
struct TileRange {
  int begin, inner_begin, inner_end, end;

  __host__ __device__ bool is_inner(int tile) const { return tile >= inner_begin && tile < inner_end; }
};

// How many tiles of `block` rows the blocks of one head count. Sequence s of a pack begins at tile cu_seqlens[s] / block
// + s, which leaves room for a last partial one; some tiles are left over, and begin at or after their sequence's end.
__host__ __device__ inline int tiles_of(const AttentionCall& call, int seqlen, int block) {
  return call.cu_seqlens_q == nullptr ? ceil_div(seqlen, block) : seqlen / block + call.num_sequences;
}

// The place of block `number`, which owns kRows queries of a head of q or, if kOfKeys, keys of a head of k. The tiles of
// one head follow each other, the last, which has the most work under a causal mask, first.
template <bool kOfKeys, int kRows>
__device__ __forceinline__ Place place_of(const AttentionCall& call, int number) {
  const int seqlen = kOfKeys ? call.seqlen_k : call.seqlen_q;
  const int num_heads = kOfKeys ? call.num_heads / call.group : call.num_heads;
  const int tiles = tiles_of(call, seqlen, kRows);
  const int tile = tiles - 1 - number % tiles, row = number / tiles;
  Place place = {};
  place.batch = row / num_heads;
  place.head = row % num_heads;
  int seqlen_q = call.seqlen_q, key_end = call.seqlen_k;
  if (call.cu_seqlens_q != nullptr) {
    const int64_t* const own = kOfKeys ? call.cu_seqlens_k : call.cu_seqlens_q;
    int sequence = 0, after = call.num_sequences;
    while (sequence + 1 < after) {
      const int middle = (sequence + after) / 2;
      (own[middle] / kRows + middle <= tile ? sequence : after) = middle;
    }
    place.sample = sequence;
    place.first = (tile - static_cast<int>(own[sequence] / kRows) - sequence) * kRows;
    place.first_query = static_cast<int>(call.cu_seqlens_q[sequence]);
    place.first_key = static_cast<int>(call.cu_seqlens_k[sequence]);
    seqlen_q = static_cast<int>(call.cu_seqlens_q[sequence + 1]) - place.first_query;
    key_end = static_cast<int>(call.cu_seqlens_k[sequence + 1]) - place.first_key;
    place.seqlen_k = key_end;
  } else {
    place.sample = place.batch;
    place.first = tile * kRows;
    place.seqlen_k = call.seqlen_k;
    if (call.key_lengths != nullptr) {
      const int64_t length = call.key_lengths[place.batch];
      key_end = static_cast<int>(min(max(length, int64_t{0}), static_cast<int64_t>(call.seqlen_k)));
    }
  }
  place.window = {seqlen_q, key_end, place.seqlen_k - seqlen_q, call.window_left, call.window_right};
  return place;
}

// How many of the block's kRows own rows exist, of a sequence of `seqlen`; none where the tile is left over.
template <int kRows>
__device__ __forceinline__ int rows_of(const Place& place, int seqlen) {
  return min(seqlen - place.first, kRows);
}

// Where the statistics of the sequence's first query stand.
__device__ __forceinline__ int64_t statistics_row(const AttentionCall& call, const Place& place, int head) {
  return (static_cast<int64_t>(place.batch) * call.num_heads + head) * call.seqlen_q + place.first_query;
}

// [begin, end) cut into tiles of kStep, and the tiles that lie in [inner_begin, inner_end); ends may be negative.
template <int kStep>
__device__ __forceinline__ TileRange tile_range(int begin, int inner_begin, int inner_end, int end) {
  const auto tile = [](int x) { return max(x, 0) / kStep; };
  TileRange tiles = {tile(begin), tile(inner_begin + kStep - 1), tile(inner_end), tile(end + kStep - 1)};
  tiles.inner_begin = min(max(tiles.inner_begin, tiles.begin), tiles.end);
  tiles.inner_end = min(max(tiles.inner_end, tiles.inner_begin), tiles.end);
  return tiles;
}

// The tiles of kStep keys that queries [first, end) see.
template <int kStep>
__device__ __forceinline__ TileRange key_tiles(const Window& window, int first, int end) {
  return tile_range<kStep>(window.key_begin(first), window.key_begin(end - 1), window.key_end_of(first),
                           window.key_end_of(end - 1));
}

// The tiles of kStep queries that see one of kRows keys from `first` on; none is inner where keys are padding.
template <int kRows, int kStep>
__device__ __forceinline__ TileRange query_tiles(const Window& window, int first) {
  if (first >= window.key_end) return {0, 0, 0, 0};
  const int last = min(first + kRows, window.key_end) - 1;
  const int inner_end = first + kRows <= window.key_end ? window.query_end_of(first) : 0;
  return tile_range<kStep>(window.query_begin(first), window.query_begin(last), inner_end, window.query_end_of(last));
}

}  // namespace leedl
