// From scores to probabilities and to the gradients of scores, in attention's backward pass.
#pragma once

#include "attention_scores.h"

namespace leedl {

// Of the kernel that owns keys, or queries.
template <int kDim, bool kOfKeys>
struct BackwardShape {
  static constexpr int kWarps = kDim <= 64 ? 4 : 8, kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kDim <= 64 ? 2 : 1;  // as many sums as registers hold
  static constexpr int kOwn = 16 * kRowTiles * kWarps;  // rows of a block
  static constexpr int kStep = kOfKeys && kDim == 64 ? 16 : 32;  // rows of the other side at once, as registers allow

  template <typename T>
  static constexpr int bytes() {
    const int columns = 2 * 3 * kStep * static_cast<int>(sizeof(float));
    return Tile<T, kDim>::bytes(2 * kOwn + 2 * 2 * kStep) + columns;
  }
};

// (batch, num_heads, seqlen_q): base and inverse_sum of AttentionStatistics, which are 0 where the row sees nothing, and
// delta = dout . out - dlse.
struct RowStatistics {
  const float* base;
  const float* inverse_sum;
  const float* delta;
};

// Of the query of number i of row tile m and column tile n of a fragment.
struct Statistics {
  float base, inverse_sum, delta;
};

// Where queries are columns: kStep of them in shared memory, zeros for those that do not exist.
template <int kStep>
struct ColumnStatistics {
  float* data;  // [3, kStep]

  // `row`: of the first query; `queries` exist from it on.
  __device__ __forceinline__ void begin_copy(const RowStatistics& statistics, int64_t row, int queries) const {
    const int which = threadIdx.x / kStep, query = threadIdx.x % kStep;
    if (which >= 3) return;
    const float* const of = which == 0 ? statistics.base : which == 1 ? statistics.inverse_sum : statistics.delta;
    const bool exists = query < queries;
    begin_copy_4(data + threadIdx.x, of + (exists ? row + query : 0), exists ? 4 : 0);
  }
  __device__ __forceinline__ Statistics operator()(int, int n, int i, const Lane& l) const {
    const float* const column = data + 8 * n + 2 * l.member + i % 2;
    return {column[0], column[kStep], column[2 * kStep]};
  }
};

// Where queries are rows: in registers.
template <int kRowTiles>
struct OwnStatistics {
  Statistics of[kRowTiles][2];

  __device__ __forceinline__ OwnStatistics(const RowStatistics& statistics, int64_t row, int queries,
                                           const Lane& l) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = 16 * m + 8 * half + l.group;
        of[m][half] = {0.0f, 0.0f, 0.0f};
        if (own < queries) {
          of[m][half] = {statistics.base[row + own], statistics.inverse_sum[row + own], statistics.delta[row + own]};
        }
      }
    }
  }
  __device__ __forceinline__ Statistics operator()(int m, int, int i, const Lane&) const { return of[m][i / 2]; }
};

// As the forward pass made them.
template <int kRowTiles, int kColumns, typename OfQueries>
__device__ __forceinline__ void make_probabilities(Fragments<kRowTiles, kColumns>& scores, const OfQueries& statistics,
                                                   float factor, const Lane& l) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const Statistics of = statistics(m, n, i, l);
        scores[m][n][i] = exp2_approximate(fmaf(scores[m][n][i], factor, -of.base)) * of.inverse_sum;
      }
    }
  }
}

// From dp = dout . v to ds = p (dp - delta).
template <int kRowTiles, int kColumns, typename OfQueries>
__device__ __forceinline__ void make_score_gradients(Fragments<kRowTiles, kColumns>& dp,
                                                     const Fragments<kRowTiles, kColumns>& p,
                                                     const OfQueries& statistics, const Lane& l) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) dp[m][n][i] = p[m][n][i] * (dp[m][n][i] - statistics(m, n, i, l).delta);
    }
  }
}

// Zeros where is_alone(row, column): see sees_one_key.
template <int kRowTiles, int kColumns, typename IsAlone>
__device__ __forceinline__ void leave_out(Fragments<kRowTiles, kColumns>& dp, const IsAlone& is_alone, const Lane& l) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if (is_alone(16 * m + i / 2 * 8 + l.group, 8 * n + 2 * l.member + i % 2)) dp[m][n][i] = 0.0f;
      }
    }
  }
}

}  // namespace leedl
