// Attention, backward; leedl_fast/reference/attention.py derives the formulas.
//
// Deterministic, without atomics: one kernel owns keys, and their dk and dv, and loops over the queries that see them;
// one owns queries, and their dq, and loops over the keys that they see. Both make the probabilities again, of scores and
// each row's statistics. Own rows stay in shared memory, those of the other side come in tiles, the next while one is
// worked on. Scores have own rows as rows and the others as columns: so no probability leaves the registers of its lane,
// from the score to the fragment that the sums are made of.
#include "attention_call.h"
#include "attention_delta.h"
#include "attention_gradients.h"

namespace leedl {
namespace {

// Loops over `steps` tiles, `first` and those that follow: begin(tile, stage) begins to copy one to one of two stages,
// while use(tile, stage) works on the other.
template <typename Position, typename Following, typename Begin, typename Use>
__device__ __forceinline__ void for_each_tile(int steps, Position first, const Following& following, const Begin& begin,
                                              const Use& use) {
  if (steps > 0) begin(first, steps % 2);
  Position tile = first;
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
    wait_for_copies();
    __syncthreads();  // the tile is there, and nobody reads the one before
    if (left > 1) begin(following(tile), (left - 1) % 2);
    use(tile, left % 2);
    tile = following(tile);
  }
}

// A tile of queries of one head of a group.
struct QueryTile {
  int number, head;
};

// One block owns kOwn keys of one head of k and v, for all heads of q that read it.
template <typename T, int kDim>
__global__ void __launch_bounds__(BackwardShape<kDim, true>::kThreads)
    attention_key_value_kernel(const __grid_constant__ AttentionCall call, const RowStatistics statistics,
                               const Heads<T> dk, const Heads<T> dv, const Heads<const T> dout,
                               const Heads<const T> q, const Heads<const T> k, const Heads<const T> v,
                               bool is_aligned) {
  using Shape = BackwardShape<kDim, true>;
  constexpr int kThreads = Shape::kThreads, kRowTiles = Shape::kRowTiles;
  constexpr int kOwn = Shape::kOwn, kStep = Shape::kStep;
  const Place place = place_of<true, kOwn>(call, blockIdx.x);
  const Window& window = place.window;
  const int keys = rows_of<kOwn>(place, place.seqlen_k);
  if (keys <= 0) return;
  const TileRange tiles = query_tiles<kOwn, kStep>(window, place.first);
  const int steps = call.group * max(tiles.end - tiles.begin, 0);
  const int first_head = place.head * call.group;

  const Tile<T, kDim> k_tile = {shared_memory<T>()};
  const Tile<T, kDim> v_tile = {k_tile.data + kOwn * kDim};
  T* const stages = v_tile.data + kOwn * kDim;
  const auto q_tile = [&](int stage) { return Tile<T, kDim>{stages + 2 * stage * kStep * kDim}; };
  const auto dout_tile = [&](int stage) { return Tile<T, kDim>{stages + (2 * stage + 1) * kStep * kDim}; };
  float* const all_columns = reinterpret_cast<float*>(stages + 2 * 2 * kStep * kDim);
  const auto columns = [&](int stage) { return ColumnStatistics<kStep>{all_columns + 3 * stage * kStep}; };

  const Lane l;
  const int first_row = 16 * kRowTiles * l.warp;  // of the warp's own
  const int first_key = place.first + first_row;
  if (steps > 0) {
    const int visible = window.key_end - place.first;
    begin_copy<kOwn, kThreads>(k_tile, k.row(place.batch, place.head, place.first_key + place.first), k.stride_m,
                               visible, call.head_dim);
    begin_copy<kOwn, kThreads>(v_tile, v.row(place.batch, place.head, place.first_key + place.first), v.stride_m,
                               visible, call.head_dim_v);
  }
  const auto begin = [&](QueryTile tile, int stage) {
    const int first = tile.number * kStep, queries = window.seqlen_q - first;
    begin_copy<kStep, kThreads>(q_tile(stage), q.row(place.batch, tile.head, place.first_query + first), q.stride_m,
                                queries, call.head_dim);
    begin_copy<kStep, kThreads>(dout_tile(stage), dout.row(place.batch, tile.head, place.first_query + first),
                                dout.stride_m, queries, call.head_dim_v);
    columns(stage).begin_copy(statistics, statistics_row(call, place, tile.head) + first, queries);
  };
  const auto following = [&](QueryTile tile) -> QueryTile {
    if (tile.number + 1 < tiles.end) return {tile.number + 1, tile.head};
    return {tiles.begin, tile.head + 1};
  };
  Fragments<kRowTiles, kDim> dk_sums = {}, dv_sums = {};
  const auto use = [&](QueryTile tile, int stage) {
    const int first_query = tile.number * kStep;
    Fragments<kRowTiles, kStep> p, ds;  // [keys, queries]
    multiply_rows<kRowTiles, kStep>(p, k_tile, first_row, q_tile(stage), l);
    if (call.changes_scores) {
      const float slope = slope_of(call, place, tile.head);
      change_scores<kRowTiles, kStep>(p, call, slope, first_key - window.shift - first_query, l);
    }
    if (!tiles.is_inner(tile.number)) {
      const auto visible = [&](int row) { return queries_of(window, first_key + row, first_query); };
      hide<kRowTiles, kStep>(p, visible, l);
    }
    make_probabilities<kRowTiles, kStep>(p, columns(stage), call.factor, l);
    add_weighted_rows<kRowTiles, kStep>(dv_sums, p, dout_tile(stage), l);
    multiply_rows<kRowTiles, kStep>(ds, v_tile, first_row, dout_tile(stage), l);
    if (!tiles.is_inner(tile.number) && call.sinks == nullptr) {
      leave_out<kRowTiles, kStep>(ds, [&](int, int column) { return sees_one_key(window, first_query + column); }, l);
    }
    make_score_gradients<kRowTiles, kStep>(ds, p, columns(stage), l);
    add_weighted_rows<kRowTiles, kStep>(dk_sums, ds, q_tile(stage), l);
  };
  for_each_tile(steps, QueryTile{tiles.begin, first_head}, following, begin, use);
  T* const to_dk = dk.row(place.batch, place.head, place.first_key + first_key);
  T* const to_dv = dv.row(place.batch, place.head, place.first_key + first_key);
  store_rows<kRowTiles>(dk_sums, [&](int, int) { return call.softmax_scale; }, k_tile, first_row, to_dk, dk.stride_m,
                        keys - first_row, call.head_dim, is_aligned, l);
  store_rows<kRowTiles>(dv_sums, [](int, int) { return 1.0f; }, v_tile, first_row, to_dv, dv.stride_m,
                        keys - first_row, call.head_dim_v, is_aligned, l);
}

// One block owns kOwn queries of one head.
template <typename T, int kDim>
__global__ void __launch_bounds__(BackwardShape<kDim, false>::kThreads)
    attention_query_kernel(const __grid_constant__ AttentionCall call, const RowStatistics statistics,
                           const Heads<T> dq, const Heads<const T> dout, const Heads<const T> q,
                           const Heads<const T> k, const Heads<const T> v, bool is_aligned) {
  using Shape = BackwardShape<kDim, false>;
  constexpr int kThreads = Shape::kThreads, kRowTiles = Shape::kRowTiles;
  constexpr int kOwn = Shape::kOwn, kStep = Shape::kStep;
  const Place place = place_of<false, kOwn>(call, blockIdx.x);
  const Window& window = place.window;
  const int queries = rows_of<kOwn>(place, window.seqlen_q);
  if (queries <= 0) return;
  const TileRange tiles = key_tiles<kStep>(window, place.first, place.first + queries);
  const int head_k = place.head / call.group;
  const T* const first_k = k.row(place.batch, head_k, place.first_key);
  const T* const first_v = v.row(place.batch, head_k, place.first_key);

  const Tile<T, kDim> q_tile = {shared_memory<T>()};
  const Tile<T, kDim> dout_tile = {q_tile.data + kOwn * kDim};
  T* const stages = dout_tile.data + kOwn * kDim;
  const auto k_tile = [&](int stage) { return Tile<T, kDim>{stages + 2 * stage * kStep * kDim}; };
  const auto v_tile = [&](int stage) { return Tile<T, kDim>{stages + (2 * stage + 1) * kStep * kDim}; };

  const Lane l;
  const int first_row = 16 * kRowTiles * l.warp;  // of the warp's own
  const int first_query = place.first + first_row;
  const float slope = slope_of(call, place, place.head);
  if (tiles.begin < tiles.end) {
    const int first = place.first_query + place.first;
    begin_copy<kOwn, kThreads>(q_tile, q.row(place.batch, place.head, first), q.stride_m, queries, call.head_dim);
    begin_copy<kOwn, kThreads>(dout_tile, dout.row(place.batch, place.head, first), dout.stride_m, queries,
                               call.head_dim_v);
  }
  const int64_t statistics_of_first = statistics_row(call, place, place.head) + first_query;
  const OwnStatistics<kRowTiles> own(statistics, statistics_of_first, queries - first_row, l);
  const auto begin = [&](int tile, int stage) {
    const int first = tile * kStep, keys = window.key_end - first;
    begin_copy<kStep, kThreads>(k_tile(stage), first_k + first * k.stride_m, k.stride_m, keys, call.head_dim);
    begin_copy<kStep, kThreads>(v_tile(stage), first_v + first * v.stride_m, v.stride_m, keys, call.head_dim_v);
  };
  Fragments<kRowTiles, kDim> sums = {};
  const auto use = [&](int tile, int stage) {
    const int first_key = tile * kStep;
    Fragments<kRowTiles, kStep> p, ds;  // [queries, keys]
    multiply_rows<kRowTiles, kStep>(p, q_tile, first_row, k_tile(stage), l);
    if (call.changes_scores) {
      change_scores<kRowTiles, kStep>(p, call, slope, first_query + window.shift - first_key, l);
    }
    const bool is_inner = tiles.is_inner(tile);
    if (!is_inner) {
      const auto visible = [&](int row) { return keys_of(window, first_query + row, first_key); };
      hide<kRowTiles, kStep>(p, visible, l);
    }
    make_probabilities<kRowTiles, kStep>(p, own, call.factor, l);
    multiply_rows<kRowTiles, kStep>(ds, dout_tile, first_row, v_tile(stage), l);
    if (!is_inner && call.sinks == nullptr) {
      leave_out<kRowTiles, kStep>(ds, [&](int row, int) { return sees_one_key(window, first_query + row); }, l);
    }
    make_score_gradients<kRowTiles, kStep>(ds, p, own, l);
    add_weighted_rows<kRowTiles, kStep>(sums, ds, k_tile(stage), l);
  };
  for_each_tile(tiles.end - tiles.begin, tiles.begin, [](int tile) { return tile + 1; }, begin, use);
  T* const to = dq.row(place.batch, place.head, place.first_query + first_query);
  store_rows<kRowTiles>(sums, [&](int, int) { return call.softmax_scale; }, q_tile, first_row, to, dq.stride_m,
                        queries - first_row, call.head_dim, is_aligned, l);
}

}  // namespace

namespace entry_points {

bool attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& delta,
                        const Tensor& dsinks_of_rows, const Tensor& dout, const Tensor& out, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& dlse, const Tensor& base,
                        const Tensor& inverse_sum, const AttentionInputs& inputs, const AttentionOptions& options) {
  if (!rows_are_aligned({dout, out, q, k, v})) return false;
  const AttentionCall call = make_call(q, k, v, inputs, options);
  const RowStatistics statistics = {base.data<const float>(), inverse_sum.data<const float>(),
                                    delta.data<const float>()};
  const bool is_aligned = rows_are_aligned({dq, dk, dv});
  const Stream stream(q);
  fill_delta(stream, call, delta, dsinks_of_rows, dout, out, dlse, base, inverse_sum);
  dispatch_tiles<kMaxHeadDimBackward>(q.dtype(), std::max(call.head_dim, call.head_dim_v), [&](auto tag, auto dim) {
    using T = typename decltype(tag)::Type;
    constexpr int kDim = decltype(dim)::value;
    using OfQueries = BackwardShape<kDim, false>;
    using OfKeys = BackwardShape<kDim, true>;
    static_assert(std::max(OfQueries::template bytes<T>(), OfKeys::template bytes<T>()) <= kMostSharedBytes);
    const int64_t blocks_q = q.size(0) * call.num_heads * tiles_of(call, call.seqlen_q, OfQueries::kOwn);
    const int64_t blocks_k = q.size(0) * k.size(1) * tiles_of(call, call.seqlen_k, OfKeys::kOwn);
    launch_tiles(stream, attention_query_kernel<T, kDim>, blocks_q, OfQueries::kThreads,
                 OfQueries::template bytes<T>(), call, statistics, heads<T>(dq), heads<const T>(dout),
                 heads<const T>(q), heads<const T>(k), heads<const T>(v), is_aligned);
    launch_tiles(stream, attention_key_value_kernel<T, kDim>, blocks_k, OfKeys::kThreads,
                 OfKeys::template bytes<T>(), call, statistics, heads<T>(dk), heads<T>(dv), heads<const T>(dout),
                 heads<const T>(q), heads<const T>(k), heads<const T>(v), is_aligned);
  });
  return true;
}

}  // namespace entry_points
}  // namespace leedl
