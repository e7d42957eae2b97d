// From q . k to scores, for fragments whose rows are queries and columns keys, or the other way round.
#pragma once

#include <cmath>

#include "attention_products.h"

namespace leedl {

constexpr float kLog2E = 1.44269504f;  // log2(e)
constexpr float kLn2 = 0.693147181f;   // ln(2)

// Columns [begin, end) of a tile; both may lie outside.
struct Columns {
  int begin, end;
};

// The columns of keys, from `first_key` on, that a query sees.
__device__ __forceinline__ Columns keys_of(const Window& window, int query, int first_key) {
  return {window.key_begin(query) - first_key, window.key_end_of(query) - first_key};
}

// The columns of queries, from `first_query` on, that see a key.
__device__ __forceinline__ Columns queries_of(const Window& window, int key, int first_query) {
  if (key >= window.key_end) return {0, 0};
  return {window.query_begin(key) - first_query, window.query_end_of(key) - first_query};
}

// The probability of such a query's key is 1 whatever the score: its dp and delta, equal but for their rounding, are
// left out of ds.
__device__ __forceinline__ bool sees_one_key(const Window& window, int query) {
  return window.key_end_of(query) - window.key_begin(query) == 1;
}

// Scores that are not visible become -inf; visible(row) says the Columns of a row of the warp's.
template <int kRowTiles, int kColumns, typename Visible>
__device__ __forceinline__ void hide(Fragments<kRowTiles, kColumns>& scores, const Visible& visible, const Lane& l) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Columns columns = visible(16 * m + 8 * half + l.group);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * n + 2 * l.member + i;
          if (column < columns.begin || column >= columns.end) scores[m][n][2 * half + i] = -INFINITY;
        }
      }
    }
  }
}

// From products to scores, where that is more than a factor of the exponents. `diagonal`: the column of the warp's first
// row that is as far as the row itself; slope * the distance is subtracted.
template <int kRowTiles, int kColumns>
__device__ __forceinline__ void change_scores(Fragments<kRowTiles, kColumns>& scores, const AttentionCall& call,
                                              float slope, int diagonal, const Lane& l) {
  const int first = diagonal + l.group - 2 * l.member;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int distance = first + 16 * m + i / 2 * 8 - 8 * n - i % 2;
        scores[m][n][i] = scores[m][n][i] * call.score_scale - slope * static_cast<float>(abs(distance));
      }
    }
  }
}

__device__ __forceinline__ float slope_of(const AttentionCall& call, const Place& place, int head) {
  return call.alibi_slopes == nullptr ? 0.0f : call.alibi_slopes[place.sample * call.alibi_stride_b + head];
}

}  // namespace leedl
