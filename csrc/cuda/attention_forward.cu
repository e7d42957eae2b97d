// Attention, forward: online softmax (Milakov and Gimelshein 2018) over tiles of keys, as FlashAttention-2 (Dao 2023) has
// it; leedl_fast/reference/attention.py derives the formulas.
//
// A block owns kBlockM queries of one head, and each of its warps 16 kRowTiles of them: no two warps share a row, so the
// softmax needs no shared memory. The sums stay in registers. One tile of keys and one of values lie in shared memory;
// while the scores of a tile are made its values are on their way, and while those are weighted the next tile's keys.
// What only a tile at the edge of the window needs, at the diagonal, or at the end of the keys, is behind a branch that
// the whole block takes or not.
#include "attention_call.h"
#include "attention_softmax.h"

namespace leedl {
namespace {

template <int kDim>
struct ForwardShape {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;  // as many sums as registers hold
  static constexpr int kBlockM = 16 * kRowTiles * kWarps;
  static constexpr int kBlockN = kDim == 128 ? 32 : 64;  // as many scores
};

template <typename T, int kDim>
__global__ void __launch_bounds__(ForwardShape<kDim>::kThreads)
    attention_forward_kernel(const __grid_constant__ AttentionCall call, const AttentionStatistics statistics,
                             const Heads<T> out, const Heads<const T> q, const Heads<const T> k,
                             const Heads<const T> v, bool is_aligned) {
  using Shape = ForwardShape<kDim>;
  constexpr int kThreads = Shape::kThreads, kRowTiles = Shape::kRowTiles;
  constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
  const Place place = place_of<false, kBlockM>(call, blockIdx.x);
  const Window& window = place.window;
  const int queries = rows_of<kBlockM>(place, window.seqlen_q);
  if (queries <= 0) return;
  const int head_k = place.head / call.group;
  const T* const first_k = k.row(place.batch, head_k, place.first_key);
  const T* const first_v = v.row(place.batch, head_k, place.first_key);
  const TileRange tiles = key_tiles<kBlockN>(window, place.first, place.first + queries);

  const Tile<T, kDim> q_tile = {shared_memory<T>()};
  const Tile<T, kDim> k_tile = {q_tile.data + kBlockM * kDim};
  const Tile<T, kDim> v_tile = {k_tile.data + kBlockN * kDim};
  const auto begin_k = [&](int tile) {
    const int first = tile * kBlockN;
    begin_copy<kBlockN, kThreads>(k_tile, first_k + first * k.stride_m, k.stride_m, window.key_end - first,
                                  call.head_dim);
  };
  const auto begin_v = [&](int tile) {
    const int first = tile * kBlockN;
    begin_copy<kBlockN, kThreads>(v_tile, first_v + first * v.stride_m, v.stride_m, window.key_end - first,
                                  call.head_dim_v);
  };

  const Lane l;
  const int first_row = 16 * kRowTiles * l.warp;  // of the warp's own
  const int first_query = place.first + first_row;
  const float slope = slope_of(call, place, place.head);
  OnlineSoftmax<kRowTiles> softmax;
  Fragments<kRowTiles, kDim> sums = {};
  if (tiles.begin < tiles.end) {
    const T* const own = q.row(place.batch, place.head, place.first_query + place.first);
    begin_copy<kBlockM, kThreads>(q_tile, own, q.stride_m, queries, call.head_dim);
    begin_k(tiles.begin);
  }
#pragma unroll 1
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    wait_for_copies();
    __syncthreads();  // the keys are there, and nobody reads the values of the tile before
    begin_v(tile);
    const int first_key = tile * kBlockN;
    Fragments<kRowTiles, kBlockN> scores;
    multiply_rows<kRowTiles, kBlockN>(scores, q_tile, first_row, k_tile, l);
    if (call.changes_scores) {
      change_scores<kRowTiles, kBlockN>(scores, call, slope, first_query + window.shift - first_key, l);
    }
    if (!tiles.is_inner(tile)) {
      const auto visible = [&](int row) { return keys_of(window, first_query + row, first_key); };
      hide<kRowTiles, kBlockN>(scores, visible, l);
    }
    softmax.template add<kBlockN, kDim>(scores, sums, call.factor);
    wait_for_copies();
    __syncthreads();  // the values are there, and nobody reads the keys
    if (tile + 1 < tiles.end) begin_k(tile + 1);
    add_weighted_rows<kRowTiles, kBlockN>(sums, scores, v_tile, l);
  }

  float factors[kRowTiles][2];
  const float sink = call.sinks == nullptr ? -INFINITY : call.sinks[place.head];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto result = softmax.finish(m, half, call.factor, sink);
      factors[m][half] = result.factor;
      const int row = first_row + 16 * m + 8 * half + l.group;
      if (statistics.lse != nullptr && l.member == 0 && row < queries) {
        const int64_t at = statistics_row(call, place, place.head) + place.first + row;
        statistics.lse[at] = result.lse;
        statistics.base[at] = result.base;
        statistics.inverse_sum[at] = result.inverse_sum;
      }
    }
  }
  T* const to = out.row(place.batch, place.head, place.first_query + first_query);
  store_rows<kRowTiles>(sums, [&](int m, int half) { return factors[m][half]; }, q_tile, first_row, to, out.stride_m,
                        queries - first_row, call.head_dim_v, is_aligned, l);
}

}  // namespace

namespace entry_points {

bool attention_forward(const Tensor& out, const Tensor& lse, const Tensor& base, const Tensor& inverse_sum,
                       const Tensor& q, const Tensor& k, const Tensor& v, const AttentionInputs& inputs,
                       const AttentionOptions& options) {
  if (!rows_are_aligned({q, k, v})) return false;
  const AttentionCall call = make_call(q, k, v, inputs, options);
  const AttentionStatistics statistics = {lse.data<float>(), base.data<float>(), inverse_sum.data<float>()};
  const bool is_aligned = rows_are_aligned({out});
  const Stream stream(q);
  dispatch_tiles<kMaxHeadDim>(q.dtype(), std::max(call.head_dim, call.head_dim_v), [&](auto tag, auto dim) {
    using T = typename decltype(tag)::Type;
    constexpr int kDim = decltype(dim)::value;
    using Shape = ForwardShape<kDim>;
    constexpr int kBytes = Tile<T, kDim>::bytes(Shape::kBlockM + 2 * Shape::kBlockN);
    static_assert(kBytes <= kMostSharedBytes);
    const int64_t blocks = q.size(0) * call.num_heads * tiles_of(call, call.seqlen_q, Shape::kBlockM);
    launch_tiles(stream, attention_forward_kernel<T, kDim>, blocks, Shape::kThreads, kBytes, call, statistics,
                 heads<T>(out), heads<const T>(q), heads<const T>(k), heads<const T>(v), is_aligned);
  });
  return true;
}

}  // namespace entry_points
}  // namespace leedl
