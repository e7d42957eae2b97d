// linear_cross_entropy.cpp: how a problem is cut into tasks, and the memory that they work in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "dtypes.h"
#include "linear_cross_entropy_products.h"
#include "memory.h"

namespace leedl {

constexpr int64_t kTasks = 24;  // many divisors: few numbers of threads leave one idle

// X is the dtype of hidden, weight and bias. Everything is computed in T, and so are the gradients kept.
template <typename X>
struct LinearCrossEntropy {
  using T = Accumulate<X>;

  // loss is (rows) where per_row, else a scalar; null where it is not wanted. So are dhidden (rows, features), dweight
  // (classes, features) and dbias (classes), contiguous; they are made all three or none, but for dbias.
  X* loss;
  T* dhidden;
  T* dweight;
  T* dbias;
  const X* dloss;  // (rows) where per_row, else null for 1
  const X* hidden;
  const X* weight;
  const X* bias;  // (classes) or null
  const int64_t* targets;
  int64_t rows, features, classes, hidden_stride, weight_stride, ignore_index;
  bool per_row, mean;
  double label_smoothing;
  int num_threads;
};

// The rows of a group's chunk: kept[first], kept[first + 1], ...
struct Chunk {
  int64_t first, rows;
};

// Depends on the sizes alone, not on the number of threads.
struct Plan {
  bool gradients;
  int64_t features, classes, block_classes;
  int64_t pitch;              // of features in whole vectors
  std::vector<int64_t> kept;  // the rows that are not ignored
  int64_t chunks, blocks, slices, groups;
  int64_t steps;  // chunks of a group, at most

  template <typename X>
  Plan(const LinearCrossEntropy<X>& args, int64_t block_classes)
      : gradients(args.dweight != nullptr),
        features(args.features),
        classes(args.classes),
        block_classes(block_classes),
        pitch(round_up(features, Vec<Accumulate<X>>::kSize)) {
    for (int64_t row = 0; row < args.rows; ++row) {
      if (args.targets[row] != args.ignore_index) kept.push_back(row);
    }
    chunks = divide_up(rows(), kChunkRows);
    blocks = divide_up(classes, block_classes);
    slices = std::min(blocks, kTasks);
    groups = std::min(chunks, kTasks / slices);
    steps = groups > 0 ? divide_up(chunks, groups) : 0;
  }

  int64_t rows() const { return static_cast<int64_t>(kept.size()); }

  Chunk chunk(int64_t step, int64_t group) const {
    const int64_t index = group * chunks / groups + step;
    if (index >= (group + 1) * chunks / groups) return {0, 0};
    return {index * kChunkRows, std::min(kChunkRows, rows() - index * kChunkRows)};
  }

  // Calls body(first class, classes, block) for the blocks of a slice.
  template <typename Body>
  void for_each_block(int64_t slice, const Body& body) const {
    for (int64_t block = slice * blocks / slices; block < (slice + 1) * blocks / slices; ++block) {
      body(block * block_classes, std::min(block_classes, classes - block * block_classes), block);
    }
  }
};

// The memory of a chunk: of one group, or of one thread where a group is one task. P makes the products: VectorProducts
// or AmxProducts, whose depth() stands below.
template <typename P>
struct ChunkMemory {
  using E = typename P::E;
  using T = typename P::T;

  E* columns;        // hidden^T: [kChunkRows / W] panels of [depth(features)][W]
  E* panels;         // hidden: [pitch / W] panels of [depth(kChunkRows)][W]
  T* logits;         // [blocks][block_classes][kChunkRows], then exp(logit - maximum), then the gradient
  T* maxima;         // [blocks][kChunkRows] largest logits, then what makes probabilities of the block
  T* sums;           // [blocks][kChunkRows] sums of exp(logit - maximum)
  T* logit_sums;     // [blocks][kChunkRows], with label smoothing alone
  T* target_logits;  // [kChunkRows], NaN where a target is no class
  T* dlosses;        // [kChunkRows], 0 beyond the last row
  T* dhidden;        // [slices][kChunkRows][pitch], where there are several slices to add up
  int64_t bytes;

  ChunkMemory(std::byte* base, const Plan& plan) {
    const int64_t statistics = plan.blocks * kChunkRows;
    ByteArena arena(base);
    arena.take(columns, kChunkRows * P::depth(plan.features));
    arena.take(panels, plan.gradients ? P::depth(kChunkRows) * plan.pitch : 0);
    arena.take(logits, plan.gradients ? statistics * plan.block_classes : 0);
    arena.take(maxima, statistics);
    arena.take(sums, statistics);
    arena.take(logit_sums, statistics);
    arena.take(target_logits, kChunkRows);
    arena.take(dlosses, kChunkRows);
    arena.take(dhidden, plan.gradients && plan.slices > 1 ? plan.slices * kChunkRows * plan.pitch : 0);
    bytes = arena.taken();
  }
};

// What a group adds to; of the first group, the outputs.
template <typename T>
struct Partial {
  T* dweight;  // [classes][features]
  T* dbias;    // [classes]
};

// One chunk of one group.
template <typename P>
struct Work {
  Chunk chunk;
  bool first;  // of the group's chunks
  const ChunkMemory<P>& memory;
  const Partial<typename P::T>& partial;
};

// The numbers that operands of type E are packed from, for tensors of X.
template <typename X, typename E>
using PackedFrom = std::conditional_t<std::is_same_v<E, BFloat16Pair>, X, E>;

// The memory of one thread.
template <typename X, typename P>
struct Scratch {
  using E = typename P::E;
  using T = typename P::T;

  PackedFrom<X, E>* rows;  // [W][pitch] of hidden
  E* strip;                // [kStripRows][kPitch] of weight
  E* weights;              // [kDepth / W] panels of [depth(block_classes)][W]
  E* dlogits;              // [block_classes][depth(kChunkRows)], where E is not T
  E* dlogits_columns;      // P::Columns, where E is not T
  T* logits;               // [block_classes][kChunkRows], where a group keeps none
  int64_t bytes;

  Scratch(std::byte* base, const Plan& plan) {
    ByteArena arena(base);
    arena.take(rows, Vec<T>::kSize * plan.pitch);
    arena.take(strip, P::kStripRows * kPitch);
    arena.take(weights, plan.gradients ? kDepth * P::depth(plan.block_classes) : 0);
    const bool rounds = plan.gradients && !std::is_same_v<E, T>;
    arena.take(dlogits, rounds ? plan.block_classes * P::depth(kChunkRows) : 0);
    arena.take(dlogits_columns, rounds ? P::depth(plan.block_classes) * kChunkRows : 0);
    arena.take(logits, plan.gradients ? 0 : plan.block_classes * kChunkRows);
    bytes = arena.taken();
  }
};

}  // namespace leedl
