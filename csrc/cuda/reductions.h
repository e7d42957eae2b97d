// Sums over the threads of a warp and of a block. Every thread that takes part gets the sum, whose order of additions
// depends on how many they are alone.
#pragma once

#include "instructions.h"

namespace leedl {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Of each group of `lanes` neighbouring lanes, a power of two; the whole warp calls it.
template <int kSums, typename T>
__device__ __forceinline__ void sum_over_lanes(T (&values)[kSums], int lanes = kWarpSize) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) values[i] += __shfl_xor_sync(kWholeWarp, values[i], distance);
  }
}

// Of a block of whole warps, one-dimensional; the whole block calls it. `shared` has a place for each warp, which is read
// until the block's next barrier: the next sum needs other places, the one after it may have these again.
template <int kSums, typename T>
__device__ __forceinline__ void sum_over_block(T (&values)[kSums], T (*shared)[kSums]) {
  sum_over_lanes(values);
  const int warps = blockDim.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) shared[threadIdx.x / kWarpSize][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) values[i] = shared[0][i];
  for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) values[i] += shared[warp][i];
  }
}

}  // namespace leedl
