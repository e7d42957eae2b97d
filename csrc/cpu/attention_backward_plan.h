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
// `p` and `ds` for dv and dk, `ds_rows` as the left side of dq. Numbers that are operands as they stand (E is A) lie
// there once, and are made in place; pairs are made of a strip's numbers. On AMX the products go along the head in whole
// tiles, and dk and dv are made transposed (attention_backward_products.h).
template <typename E, bool kAmx>
struct BackwardScratch {
  using A = SumOf<E>;
  static constexpr bool kInPlace = std::is_same_v<E, A>;
  static constexpr int64_t kLanes = Vec<A>::kSize;
  // An odd number of cache lines, so that rows spread over the cache's sets.
  static constexpr int64_t kBlockPitch = depth_of<E>(kBlockRows<E>) + kTileSize;
  static constexpr int64_t kKeyPitch = kMaxTaskKeys + kTileSize;

  // Elements along the depth of Q . K^T, or dout . V^T.
  static constexpr int64_t depth(int64_t head_dim) {
    return kAmx ? round_up(depth_of<E>(head_dim), kTileSize) : depth_of<E>(head_dim);
  }

  E* keys_t;       // panels of [depth(head_dim)][W]: K^T
  E* values_t;     // panels of [depth(head_dim_v)][W]: V^T
  E* keys;         // [panels] panels of [depth_of(kMaxTaskKeys)][W]
  A* dk;           // [task_keys][panels * W], on AMX [panels * W][kKeyPitch]
  A* dv;           // [task_keys][panels_v * W], on AMX [panels_v * W][kKeyPitch]
  A* dq;           // [kBlockRows][panels * W]: what this task adds, without softmax_scale
  E* queries;      // [panels] panels of [depth_of(kBlockRows)][W], on AMX [panels * W][kBlockPitch]
  E* douts;        // the same of panels_v
  E* query_rows;   // [kStripRows][kHeadPitch]
  E* dout_rows;    // [kStripRows][kHeadPitch]
  E* p;            // [depth_of(kBlockRows)][kScorePitch]
  E* ds;           // [depth_of(kBlockRows)][kScorePitch]
  E* ds_rows;      // [kStripRows][kScorePitch], where not in place
  A* strip_p;      // the same
  A* strip_ds;     // the same
  A* factors;      // of dropout, [kScorePitch]
  A* slopes;       // of softcap, [kScorePitch]
  A* key_columns;  // of dk and dv, [task_keys][W], on AMX
  int64_t bytes;

  BackwardScratch(std::byte* base, const AttentionSizes& s, const BackwardPlan& plan) {
    const int64_t keys_of_sums = kAmx ? kKeyPitch : plan.task_keys;
    const int64_t rows_of_block = kAmx ? kBlockPitch : depth_of<E>(kBlockRows<E>);
    ByteArena arena(base);
    arena.take(keys_t, plan.task_keys * depth(s.head_dim));
    arena.take(values_t, plan.task_keys * depth(s.head_dim_v));
    arena.take(keys, depth_of<E>(kMaxTaskKeys) * plan.panels * kLanes);
    arena.take(dk, keys_of_sums * plan.panels * kLanes);
    arena.take(dv, keys_of_sums * plan.panels_v * kLanes);
    arena.take(dq, kBlockRows<E> * plan.panels * kLanes);
    arena.take(queries, rows_of_block * plan.panels * kLanes);
    arena.take(douts, rows_of_block * plan.panels_v * kLanes);
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
    if constexpr (kAmx) arena.take(key_columns, plan.task_keys * kLanes);
    bytes = arena.taken();
  }
};

}  // namespace leedl
