// The online softmax of a warp's rows of scores.
#pragma once

#include "attention_scores.h"

namespace leedl {

// Of the rows `group` and group + 8 of each row tile; the four lanes of a group hold a row together.
template <int kRowTiles>
struct OnlineSoftmax {
  float row_max[kRowTiles][2];  // the largest score so far
  float row_sum[kRowTiles][2];  // this lane's part of the sum of the powers, relative to 2^(row_max * factor)

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[m][half] = -INFINITY;
        row_sum[m][half] = 0.0f;
      }
    }
  }

  // Turns scores into powers of two relative to the largest score so far, and `sums`, of powers so far, with them.
  template <int kColumns, int kDim>
  __device__ __forceinline__ void add(Fragments<kRowTiles, kColumns>& scores, Fragments<kRowTiles, kDim>& sums,
                                      float factor) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = row_max[m][half];
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
        // A row that has seen no key yet has no base.
        const float base = largest == -INFINITY ? 0.0f : largest * factor;
        // Of products rounded alike, not an fma: earlier sums must stay relative to their base.
        const float rescale = exp2_approximate(row_max[m][half] * factor - base);
        row_max[m][half] = largest;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[m][n][i] = exp2_approximate(fmaf(scores[m][n][i], factor, -base));
            sum += scores[m][n][i];
          }
        }
        row_sum[m][half] = fmaf(row_sum[m][half], rescale, sum);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          sums[m][n][2 * half] *= rescale;
          sums[m][n][2 * half + 1] *= rescale;
        }
      }
    }
  }

  // What the sums of one row are to be multiplied by, and its statistics, the sink, -inf for none, included.
  struct Result {
    float factor, lse, base, inverse_sum;
  };
  __device__ __forceinline__ Result finish(int m, int half, float factor, float sink) const {
    float sum = row_sum[m][half];
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    sum += __shfl_xor_sync(kWholeWarp, sum, 2);
    const float own = row_max[m][half] * factor;
    const float base = fmaxf(own, sink * kLog2E);
    // Without keys and sink: zeros, and lse = -inf.
    if (base == -INFINITY) return {0.0f, -INFINITY, 0.0f, 0.0f};
    const float rescale = exp2_approximate(own - base);
    sum = fmaf(sum, rescale, exp2_approximate(sink * kLog2E - base));
    const float inverse_sum = 1.0f / sum;
    return {rescale * inverse_sum, (base + log2f(sum)) * kLn2, base, inverse_sum};
  }
};

}  // namespace leedl
