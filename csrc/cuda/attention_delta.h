// delta, the sum of p dp over a row, which attention's backward kernels share, and what each row gives to the gradient of
// the sinks; leedl_fast/reference/attention.py derives the formulas.
#pragma once

#include "attention_call.h"
#include "attention_gradients.h"

namespace leedl {

constexpr int kDeltaThreads = 128, kDeltaRows = 32;  // of a block

// One block owns kDeltaRows queries of one head, and `lanes` lanes a row, a power of two: each 8 of its numbers.
template <typename T>
static __global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(const __grid_constant__ AttentionCall call, float* delta, float* dsinks_of_rows,
                           const float* dlse, const float* base, const float* inverse_sum, const Heads<const T> dout,
                           const Heads<const T> out, int lanes) {
  const Place place = place_of<false, kDeltaRows>(call, blockIdx.x);
  const int column = threadIdx.x % lanes * kChunk;
  for (int row = threadIdx.x / lanes; row < kDeltaRows; row += kDeltaThreads / lanes) {
    const int query = place.first + row;
    const bool exists = query < place.window.seqlen_q;
    float sum[1] = {0.0f};
    if (exists) {
      float of_dout[kChunk], of_out[kChunk];
      const int in_pack = place.first_query + query;
      const int count = call.head_dim_v - column;
      load(dout.row(place.batch, place.head, in_pack) + column, count, true, of_dout);
      load(out.row(place.batch, place.head, in_pack) + column, count, true, of_out);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum[0] = fmaf(of_dout[i], of_out[i], sum[0]);
    }
    sum_over_lanes(sum, lanes);
    if (!exists || column != 0) continue;
    const int64_t at = statistics_row(call, place, place.head) + query;
    float of_row = call.sinks == nullptr && sees_one_key(place.window, query) ? 0.0f : sum[0];
    if (dlse != nullptr) of_row -= dlse[at];
    delta[at] = of_row;
    if (call.sinks != nullptr) {
      const float p = exp2_approximate(call.sinks[place.head] * kLog2E - base[at]) * inverse_sum[at];
      dsinks_of_rows[at] = -p * of_row;
    }
  }
}

inline void fill_delta(const Stream& stream, const AttentionCall& call, const Tensor& delta, const Tensor& dsinks_of_rows,
                       const Tensor& dout, const Tensor& out, const Tensor& dlse, const Tensor& base,
                       const Tensor& inverse_sum) {
  int lanes = 1;
  while (lanes * kChunk < call.head_dim_v) lanes *= 2;
  const int64_t blocks = dout.size(0) * call.num_heads * tiles_of(call, call.seqlen_q, kDeltaRows);
  dispatch_tiles<32>(dout.dtype(), 32, [&](auto tag, auto) {
    using T = typename decltype(tag)::Type;
    launch_tiles(stream, attention_delta_kernel<T>, blocks, kDeltaThreads, 0, call, delta.data<float>(),
                 dsinks_of_rows.data<float>(), dlse.data<const float>(), base.data<const float>(),
                 inverse_sum.data<const float>(), heads<const T>(dout), heads<const T>(out), lanes);
  });
}

}  // namespace leedl
