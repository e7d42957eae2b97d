// Attention, backward: how a problem is cut into tasks, and the memory of one of them.
#pragma once

#include "attention_products.h"

namespace leedl {

// The more keys a task owns, the less often queries are packed and dq is read, but the fewer tasks there are. How many
// it owns depends on the sizes of a sample alone, so that neither threads nor the batch change a result.
constexpr int64_t kMaxTaskKeys = 512, kMinTaskKeys = 128;
constexpr int64_t kWantedTasks = 16;  // of a sample
static_assert(kMaxTaskKeys <= kScorePitch && kMinTaskKeys % kStripRows == 0);

// Queries of a block, over which one product sums dk and dv.
template <typename E>
constexpr int64_t kBlockRows = 64 * Operand<E>::kDepth;

// How a problem is cut into tasks.
struct BackwardPlan {
  int64_t task_keys;      // a multiple of kStripRows
  int64_t chunks;         // of keys per key head
  int64_t colors;         // chunks of one color share no query (unless there is one color per chunk)
  int64_t query_blocks;   // per query head
  int64_t tasks, blocks;  // of one sample: num_heads_k * chunks and num_heads * query_blocks
  int64_t panels, panels_v;

  template <typename E>
  static BackwardPlan make(const AttentionOptions& options, const AttentionSizes& s) {
    constexpr int64_t kLanes = Vec<SumOf<E>>::kSize;
    BackwardPlan plan;
    plan.panels = (s.head_dim + kLanes - 1) / kLanes;
    plan.panels_v = (s.head_dim_v + kLanes - 1) / kLanes;
    plan.task_keys = kMaxTaskKeys;
    while (plan.task_keys > kMinTaskKeys && s.num_heads_k * s.seqlen_k < kWantedTasks * plan.task_keys) {
      plan.task_keys /= 2;
    }
    plan.chunks = (s.seqlen_k + plan.task_keys - 1) / plan.task_keys;
    const int64_t reach = options.window_left + options.window_right + kBlockRows<E>;
    plan.colors = std::max<int64_t>(std::min(1 + (reach + plan.task_keys - 1) / plan.task_keys, plan.chunks), 1);
    plan.query_blocks = (s.seqlen_q + kBlockRows<E> - 1) / kBlockRows<E>;
    plan.tasks = s.num_heads_k * plan.chunks;
    plan.blocks = s.num_heads * plan.query_blocks;
    return plan;
  }

  // Tasks begin color by color; the chunks of one color in order.
  int64_t chunk_in_order(int64_t position) const {
    for (int64_t color = 0;; ++color) {
      const int64_t members = (chunks - color + colors - 1) / colors;
      if (position < members) return color + position * colors;
      position -= members;
    }
  }
  // How many of the chunks that hold keys [first, end) begin before `chunk`.
  int64_t rank(int64_t chunk, int64_t first, int64_t end) const {
    int64_t earlier = 0;
    for (int64_t other = first / task_keys; other <= (end - 1) / task_keys; ++other) {
      const int64_t difference = other % colors - chunk % colors;
      earlier += difference < 0 || (difference == 0 && other < chunk);
    }
    return earlier;
  }
};

// The memory of one thread. Operands hold E, sums are A; see Operand. P and dS of a block of queries are operands twice:
// `p` and `ds` as the transposed left side of dv and dk, `ds_rows` as the left side of dq. Numbers that are operands as
// they stand (E is A) lie there once, and are made in place; pairs are made of a strip's numbers.
template <typename E>
struct BackwardScratch {
  using A = SumOf<E>;
  static constexpr bool kInPlace = std::is_same_v<E, A>;

  E* keys_t;      // panels of [depth(head_dim)][W]: K^T
  E* values_t;    // panels of [depth(head_dim_v)][W]: V^T
  E* keys;        // [panels] panels of [depth(kMaxTaskKeys)][W]
  A* dk;          // [task_keys][panels * W]
  A* dv;          // [task_keys][panels_v * W]
  A* dq;          // [kBlockRows][panels * W]: what this task adds, without softmax_scale
  E* queries;     // [panels] panels of [depth(kBlockRows)][W]
  E* douts;       // [panels_v] panels of [depth(kBlockRows)][W]
  E* query_rows;  // [kStripRows][kHeadPitch]
  E* dout_rows;   // [kStripRows][kHeadPitch]
  E* p;           // [depth(kBlockRows)][kScorePitch]
  E* ds;          // [depth(kBlockRows)][kScorePitch]
  E* ds_rows;     // [kStripRows][kScorePitch], where not in place
  A* strip_p;     // the same
  A* strip_ds;    // the same
  A* factors;     // of dropout, [kScorePitch]
  A* slopes;      // of softcap, [kScorePitch]
  int64_t bytes;

  BackwardScratch(std::byte* base, const AttentionSizes& s, const BackwardPlan& plan) {
    constexpr int64_t kLanes = Vec<A>::kSize;
    ByteArena arena(base);
    arena.take(keys_t, plan.task_keys * depth_of<E>(s.head_dim));
    arena.take(values_t, plan.task_keys * depth_of<E>(s.head_dim_v));
    arena.take(keys, depth_of<E>(kMaxTaskKeys) * plan.panels * kLanes);
    arena.take(dk, plan.task_keys * plan.panels * kLanes);
    arena.take(dv, plan.task_keys * plan.panels_v * kLanes);
    arena.take(dq, kBlockRows<E> * plan.panels * kLanes);
    arena.take(queries, depth_of<E>(kBlockRows<E>) * plan.panels * kLanes);
    arena.take(douts, depth_of<E>(kBlockRows<E>) * plan.panels_v * kLanes);
    arena.take(query_rows, kStripRows * kHeadPitch);
    arena.take(dout_rows, kStripRows * kHeadPitch);
    arena.take(p, depth_of<E>(kBlockRows<E>) * kScorePitch);
    arena.take(ds, depth_of<E>(kBlockRows<E>) * kScorePitch);
    if constexpr (!kInPlace) {
      arena.take(ds_rows, kStripRows * kScorePitch);
      arena.take(strip_p, kStripRows * kScorePitch);
      arena.take(strip_ds, kStripRows * kScorePitch);
    }
    arena.take(factors, kScorePitch);
    arena.take(slopes, kScorePitch);
    bytes = arena.taken();
  }
};

}  // namespace leedl
