// How the backward pass of additive attention is cut into tasks, and the memory that they work in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "additive_attention.h"

namespace leedl {

constexpr int64_t kMostStrips = kTileRows == 14 ? 4 : 8;  // of one task: their P and dS stay in the cache
constexpr int64_t kTasksPerHead = 16;                     // smaller tasks rather than fewer than this

// A is what is summed. A task owns block_rows queries of one head.
template <typename A>
struct AdditiveBackwardPlan {
  static constexpr int64_t kLanes = Vec<A>::kSize;

  int64_t strips, block_rows, query_blocks;
  int64_t key_blocks, block_keys;
  int64_t seen_blocks;     // of keys, by one task at most
  int64_t pitch, pitch_v;  // of rows of head_dim and head_dim_v numbers, in whole vectors
  int64_t head_dim_v;

  explicit AdditiveBackwardPlan(const AdditiveProblem& problem)
      : strips(std::clamp<int64_t>(problem.strips() / kTasksPerHead, 1, kMostStrips)),
        block_rows(strips * kTileRows),
        query_blocks((problem.strips() + strips - 1) / strips),
        key_blocks(problem.key_blocks()),
        block_keys(problem.block_keys<A>()),
        seen_blocks(problem.seen_blocks(block_rows)),
        pitch(round_up(problem.sizes.head_dim, kLanes)),
        pitch_v(round_up(problem.sizes.head_dim_v, kLanes)),
        head_dim_v(problem.sizes.head_dim_v) {}

  int64_t packed_size() const { return block_keys * (2 * pitch + pitch_v); }
};

// One block of keys and values.
template <typename A>
struct PackedBlock {
  A* keys_t;    // panels of [pitch][W]: exp(2 k)
  A* keys;      // [pitch / W] panels of [block_keys][W]: exp(2 k)
  A* values_t;  // panels of [head_dim_v][W]

  PackedBlock(A* base, const AdditiveBackwardPlan<A>& plan)
      : keys_t(base), keys(base + plan.block_keys * plan.pitch), values_t(base + 2 * plan.block_keys * plan.pitch) {}
};

// What one thread works in.
template <typename A>
struct AdditiveBackwardScratch {
  A* rows;     // [block_keys][max(pitch, pitch_v)]: keys or values, before they are packed
  A* direct;   // k itself, where products do not fit: panels as in PackedBlock
  A* plain;    // [block_rows][pitch], see QueryRows
  A* powers;   // [block_rows][pitch]
  A* dout;     // [block_rows][pitch_v]
  A* dout_t;   // [head_dim_v][kTileRows]
  A* douts;    // [pitch_v / W] panels of [block_rows][W]
  A* p;        // [seen_blocks][block_rows][kAdditivePitch]
  A* ds;       // [seen_blocks][block_rows][kAdditivePitch]
  A* dq;       // [block_rows][pitch], without the factor 4 w
  A* dk;       // [pitch / W] panels of [block_keys][W], without the factor 4 w
  A* dv;       // [block_keys rounded up to kTileRows][pitch_v]
  int64_t bytes;

  AdditiveBackwardScratch(std::byte* base, const AdditiveBackwardPlan<A>& plan) {
    const int64_t scores = plan.seen_blocks * plan.block_rows * kAdditivePitch;
    ByteArena arena(base);
    arena.take(rows, plan.block_keys * std::max(plan.pitch, plan.pitch_v));
    arena.take(direct, plan.block_keys * plan.pitch);
    arena.take(plain, plan.block_rows * plan.pitch);
    arena.take(powers, plan.block_rows * plan.pitch);
    arena.take(dout, plan.block_rows * plan.pitch_v);
    arena.take(dout_t, kTileRows * plan.head_dim_v);
    arena.take(douts, plan.block_rows * plan.pitch_v);
    arena.take(p, scores);
    arena.take(ds, scores);
    arena.take(dq, plan.block_rows * plan.pitch);
    arena.take(dk, plan.block_keys * plan.pitch);
    arena.take(dv, round_up(plan.block_keys, kTileRows) * plan.pitch_v);
    bytes = arena.taken();
  }
};

}  // namespace leedl
