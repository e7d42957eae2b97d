// Attention, backward: the five matrix products of a task, with their operands and the sums dk and dv, on vectors
// (gemm.h) or on AMX (amx.h).
//
// On vectors a product takes the very keys and queries that see each other. Tiles are multiplied whole: P and dS are
// zeros where a row does not see a key, and what stands beyond the keys and queries is zeros too. A tile's left operand
// has pairs along the depth, which for P^T and dS^T are pairs of queries: P and dS of a block hold such pairs, but as
// right operands, so that AMX makes dv and dk transposed, dv^T = dout^T . P and dk^T = Q^T . dS.
#pragma once

#include "attention_backward_plan.h"
#include "attention_gradients.h"

namespace leedl {

// Rows of a matrix, `stride` numbers apart.
template <typename T>
struct MatrixRows {
  const T* data;
  int64_t stride;
};

// What of a strip the keys of a task are multiplied with: the columns [begin, end) of P and dS, counted from the task's
// first key.
struct StripColumns {
  int64_t rows;
  int64_t begin, end;
};

template <typename E, bool kAmx>
class BackwardProducts {
 public:
  using A = SumOf<E>;
  using Scratch = BackwardScratch<E, kAmx>;
  static constexpr int64_t kLanes = Vec<A>::kSize;
  static constexpr int64_t kColumnKeys = kAmx ? 2 * kTileSize : kHalfRows;  // of one product of dk and dv
  static constexpr int64_t kColumnRows = kAmx ? 2 * kTileSize : Operand<E>::kDepth;  // its depth is a multiple of them
  // What strips begin and end with, so that the tiles of all products lie inside of them.
  static constexpr int64_t kKeyUnit = std::max(kLanes, kColumnKeys);

  BackwardProducts(const Scratch& scratch, const AttentionSizes& sizes, const BackwardPlan& plan)
      : scratch_(scratch), sizes_(sizes), plan_(plan) {}

  // A task begins with `keys` keys of which queries see the first `visible`.
  template <typename T>
  void begin(int64_t keys, int64_t visible, const MatrixRows<T>& k, const MatrixRows<T>& v) const {
    const int64_t rows_of_sums = kAmx ? Scratch::kKeyPitch : round_up(keys, kHalfRows);
    std::fill_n(scratch_.dk, rows_of_sums * plan_.panels * kLanes, A(0));
    std::fill_n(scratch_.dv, rows_of_sums * plan_.panels_v * kLanes, A(0));
    if (visible <= 0) return;
    pack_transposed_keys(scratch_.keys_t, k, visible, sizes_.head_dim);
    pack_transposed_keys(scratch_.values_t, v, visible, sizes_.head_dim_v);
    pack_panels(scratch_.keys, kKeyPanel, k.data, k.stride, visible, sizes_.head_dim);
    if constexpr (kAmx) {
      const int64_t first = depth_of<E>(visible), end = depth_of<E>(round_up(visible, kKeyUnit));
      for (int64_t panel = 0; panel < plan_.panels; ++panel) {
        std::fill_n(scratch_.keys + panel * kKeyPanel + first * kLanes, (end - first) * kLanes, E{});
      }
      std::fill_n(scratch_.query_rows, kStripRows * kHeadPitch, E{});  // rows end with a vector, not with a tile
      std::fill_n(scratch_.dout_rows, kStripRows * kHeadPitch, E{});
    }
  }

  // The queries of a block and their dout, as operands of dk and dv.
  template <typename T>
  void pack_block(int64_t rows, const MatrixRows<T>& q, const MatrixRows<T>& dout) const {
    pack_block_rows(scratch_.queries, q, rows, sizes_.head_dim);
    pack_block_rows(scratch_.douts, dout, rows, sizes_.head_dim_v);
  }

  // Q . K^T and dout . V^T of a strip; gradient_runs: see Scores.
  template <typename T>
  void multiply_strip(const StripColumns& strip, const MatrixRows<T>& q, A q_scale, A* scores,
                      const MatrixRows<T>& dout, int64_t gradient_runs, A* dp) const {
    pack_rows<kStripRows, kHeadPitch>(scratch_.query_rows, q.data, q.stride, strip.rows, sizes_.head_dim, q_scale);
    pack_rows<kStripRows, kHeadPitch>(scratch_.dout_rows, dout.data, dout.stride, strip.rows, sizes_.head_dim_v, A(1));
    multiply_keys(strip, score_runs(strip.rows), Scratch::depth(sizes_.head_dim), scratch_.query_rows, scratch_.keys_t, scores);
    multiply_keys(strip, gradient_runs, Scratch::depth(sizes_.head_dim_v), scratch_.dout_rows, scratch_.values_t, dp);
  }

  // dv += P^T . dout and dk += dS^T . Q over the queries of a block, and its keys [begin, end). rows_of(first key, last
  // key) is the range of queries, counted from the block's first, that see one of these keys.
  template <typename RowsOf>
  void add_columns(int64_t begin, int64_t end, const RowsOf& rows_of) const {
    add_columns(begin, end, rows_of, scratch_.p, scratch_.douts, plan_.panels_v, scratch_.dv);
    add_columns(begin, end, rows_of, scratch_.ds, scratch_.queries, plan_.panels, scratch_.dk);
  }

  // dq = dS . K of a strip, whose rows of dS are kScorePitch apart and begin with the key `begin`. keys_of(first row,
  // last row) is the range of keys that these rows of the strip see.
  template <typename KeysOf>
  void multiply_rows(const StripColumns& strip, const E* ds, const KeysOf& keys_of, A* dq) const {
    if constexpr (kAmx) {
      const AmxPanels keys{scratch_.keys + depth_of<E>(strip.begin) * kLanes, kKeyPanel, kLanes};
      multiply_on_amx(strip.rows, depth_of<E>(strip.end - strip.begin), {ds, kScorePitch}, keys, plan_.panels, false,
                      {dq, plan_.panels * kLanes});
    } else {
      for (int64_t half = 0; half < strip.rows; half += kHalfRows) {
        const auto [first, last] = keys_of(half, std::min(half + kHalfRows, strip.rows) - 1);
        A* to = dq + half * plan_.panels * kLanes;
        const A* rescale = nullptr;
        int64_t key = first;
        do {  // one sum of so many products would lose more than plain PyTorch's does
          const int64_t end = std::min(round_down(key, kSumKeys) + kSumKeys, last);
          multiply_values<E>(key < end ? depth_of<E>(end) - key / kDepth : 0,
                             ds + half * kScorePitch + (key - strip.begin) / kDepth,
                             scratch_.keys + key / kDepth * kLanes, kKeyPanel, plan_.panels, rescale, to);
          rescale = kOnes.data();
          key = end;
        } while (key < last);
      }
    }
  }

  // The task's rows of dk, multiplied by `scale`, and of dv by `scale_v`.
  template <typename T>
  void write(int64_t keys, T* dk, int64_t dk_stride, A scale, T* dv, int64_t dv_stride, A scale_v) const {
    write(keys, scratch_.dk, plan_.panels, sizes_.head_dim, scale, dk, dk_stride);
    write(keys, scratch_.dv, plan_.panels_v, sizes_.head_dim_v, scale_v, dv, dv_stride);
  }

 private:
  static constexpr int64_t kDepth = Operand<E>::kDepth;
  static constexpr int64_t kKeyPanel = depth_of<E>(kMaxTaskKeys) * kLanes;
  static constexpr int64_t kBlockPanel = depth_of<E>(kBlockRows<E>) * kLanes;
  static constexpr int64_t kSumKeys = 128;
  static constexpr std::array<A, kHalfRows> kOnes = [] {
    std::array<A, kHalfRows> ones{};
    for (A& one : ones) one = 1;
    return ones;
  }();
  static_assert(kBlockRows<E> % kColumnRows == 0 && kMinTaskKeys % kKeyUnit == 0);

  template <typename T>
  void pack_transposed_keys(E* to, const MatrixRows<T>& rows, int64_t count, int64_t head_dim) const {
    if constexpr (kAmx) {
      pack_transposed(to, rows.data, rows.stride, count, head_dim, Scratch::depth(head_dim));
    } else {
      pack_transposed(to, rows.data, rows.stride, count, head_dim);
    }
  }

  template <typename T>
  void pack_block_rows(E* to, const MatrixRows<T>& rows, int64_t count, int64_t head_dim) const {
    if constexpr (kAmx) {
      pack_columns_as_rows(to, Scratch::kBlockPitch, rows.data, rows.stride, count, head_dim);
    } else {
      pack_panels(to, kBlockPanel, rows.data, rows.stride, count, head_dim);
    }
  }

  void multiply_keys(const StripColumns& strip, int64_t runs, int64_t depth, const E* rows, const E* panels,
                     A* to) const {
    const int64_t count = (strip.end - strip.begin + kLanes - 1) / kLanes;
    panels += strip.begin * depth;
    if constexpr (kAmx) {
      multiply_on_amx(strip.rows, depth, {rows, kHeadPitch}, {panels, depth * kLanes, kLanes}, count, false,
                      {to, kScorePitch});
    } else {
      multiply_scores(runs, depth, rows, panels, count, to);
    }
  }

  template <typename RowsOf>
  void add_columns(int64_t begin, int64_t end, const RowsOf& rows_of, const E* a, const E* b, int64_t panels,
                   A* sums) const {
    for (int64_t key = begin; key < end; key += kColumnKeys) {
      auto [first, last] = rows_of(key, std::min(key + kColumnKeys, end) - 1);
      if (first >= last) continue;
      first = round_down(first, kColumnRows) / kDepth;
      last = round_up(last, kColumnRows) / kDepth;
      const E* columns = a + first * kScorePitch + key;
      if constexpr (kAmx) {
        multiply_on_amx(panels * kLanes, last - first, {b + first, Scratch::kBlockPitch},
                        {columns, kTileSize, kScorePitch}, kColumnKeys / kTileSize, true,
                        {sums + key, Scratch::kKeyPitch});
      } else {
        add_transposed(last - first, columns, b + first * kLanes, kBlockPanel, panels, sums + key * panels * kLanes);
      }
    }
  }

  template <typename T>
  void write(int64_t keys, const A* from, int64_t panels, int64_t head_dim, A scale, T* to, int64_t stride) const {
    if constexpr (kAmx) {
      for (int64_t column = 0; column < head_dim; column += kLanes) {
        pack_transposed(scratch_.key_columns, from + column * Scratch::kKeyPitch, Scratch::kKeyPitch, kLanes, keys);
        add_scaled<A, T>(keys, std::min(kLanes, head_dim - column), scratch_.key_columns, 1, scale, nullptr, 0,
                         to + column, stride);
      }
    } else {
      add_scaled<A, T>(keys, head_dim, from, panels, scale, nullptr, 0, to, stride);
    }
  }

  const Scratch& scratch_;
  const AttentionSizes& sizes_;
  const BackwardPlan& plan_;
};

}  // namespace leedl
