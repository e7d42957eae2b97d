// linear_cross_entropy.cpp: what is done with one chunk of rows. For all its rows pack_hidden, for all classes make_logits,
// for all rows make_losses, for all classes make_gradients, and for all rows add_slices, one after the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "exponentials.h"
#include "linear_cross_entropy.h"

namespace leedl {

// P makes the products; its operands hold T, or pairs of numbers of X.
template <typename X, typename P>
class LinearCrossEntropyTasks {
 public:
  using T = Accumulate<X>;
  using E = typename P::E;
  static constexpr int64_t kLanes = Vec<T>::kSize;

  // losses: of plan.kept; make_losses fills them.
  LinearCrossEntropyTasks(const LinearCrossEntropy<X>& args, const Plan& plan, T* losses)
      : args_(args), plan_(plan), smoothing_(static_cast<T>(args.label_smoothing)), losses_(losses) {}

  // A lane group of rows of the hidden states, in both packings, and the gradient of each row's loss.
  void pack_hidden(const Work<P>& work, int64_t begin, const Scratch<X, P>& scratch) {
    const ChunkMemory<P>& memory = work.memory;
    const int64_t rows = std::min(work.chunk.rows - begin, kLanes);
    std::fill_n(memory.dlosses + begin, kLanes, T(0));
    std::fill_n(memory.target_logits + begin, kLanes, std::numeric_limits<T>::quiet_NaN());
    const T scale = args_.mean ? T(1) / static_cast<T>(plan_.rows()) : T(1);
    const int64_t* const kept = plan_.kept.data() + work.chunk.first + begin;
    for (int64_t i = 0; i < rows; ++i) {
      memory.dlosses[begin + i] = args_.dloss != nullptr ? load_number(args_.dloss + kept[i]) : scale;
    }
    if constexpr (std::is_same_v<X, Rows>) {
      if (kept[rows - 1] == kept[0] + rows - 1) {
        pack_lanes(work, begin, args_.hidden + kept[0] * args_.hidden_stride, args_.hidden_stride, rows);
        return;
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const X* const row = args_.hidden + kept[i] * args_.hidden_stride;
      Rows* const to = scratch.rows + i * plan_.pitch;
      if constexpr (std::is_same_v<X, Rows>) {
        std::copy_n(row, args_.features, to);
      } else {
        pack_panels(to, kLanes, row, 0, 1, args_.features);
      }
    }
    pack_lanes(work, begin, scratch.rows, plan_.pitch, rows);
  }

  // The logits of a slice, replaced by exp(logit - maximum of the block), and the statistics of each block.
  void make_logits(const Work<P>& work, int64_t slice, const Scratch<X, P>& scratch) {
    const ChunkMemory<P>& memory = work.memory;
    const Chunk& chunk = work.chunk;
    if (chunk.rows == 0) return;
    const int64_t lane_groups = divide_up(chunk.rows, kLanes);
    plan_.for_each_block(slice, [&](int64_t first_class, int64_t classes, int64_t block) {
      T* const logits = plan_.gradients ? memory.logits + first_class * kChunkRows : scratch.logits;
      for (int64_t k = 0; k < args_.features; k += kDepth) {
        const int64_t depth = std::min(kDepth, args_.features - k);
        for (int64_t strip = 0; strip < classes; strip += P::kStripRows) {
          const int64_t first = first_class + strip, valid = std::min(P::kStripRows, classes - strip);
          pack_weights(scratch.strip, args_.weight + first * args_.weight_stride + k, valid, depth);
          T bias[P::kStripRows] = {};
          for (int64_t i = 0; i < valid && args_.bias != nullptr; ++i) bias[i] = load_number(args_.bias + first + i);
          P::template multiply<TileLayout<kPitch, 1>>(
              valid, depth_of<E>(depth), scratch.strip, memory.columns + depth_of<E>(k) * kLanes,
              P::depth(args_.features) * kLanes, lane_groups,
              [to = logits + strip * kChunkRows, bias = &bias[0], k](int64_t row, int64_t lanes, V sums) {
                T* const at = to + row * kChunkRows + lanes * kLanes;
                (sums + (k == 0 ? V::broadcast(bias[row]) : V::load(at))).store(at);
              });
        }
      }
      for_each_target(chunk, first_class, classes, [&](int64_t row, int64_t target) {
        memory.target_logits[row] = logits[target * kChunkRows + row];
      });
      for (int64_t lanes = 0; lanes < lane_groups; ++lanes) {
        block_statistics(memory, logits + lanes * kLanes, classes, block * kChunkRows + lanes * kLanes);
      }
    });
  }

  // The losses of a lane group of rows; the maxima become what makes probabilities times dloss of each block.
  void make_losses(const Work<P>& work, int64_t begin) {
    const ChunkMemory<P>& memory = work.memory;
    const int64_t rows = std::min(work.chunk.rows - begin, kLanes);
    V largest = V::broadcast(std::numeric_limits<T>::lowest()), sum = V::zero(), logit_sum = V::zero();
    for (int64_t at = begin; at < plan_.blocks * kChunkRows; at += kChunkRows) {
      largest = max(V::load(memory.maxima + at), largest);
    }
    for (int64_t at = begin; at < plan_.blocks * kChunkRows; at += kChunkRows) {
      const V factor = exp2(V::load(memory.maxima + at) - largest, V::broadcast(static_cast<T>(kLog2e)));
      sum = mul_add(V::load(memory.sums + at), factor, sum);
      factor.store(memory.maxima + at);
      if (smoothing_ != 0) logit_sum = logit_sum + V::load(memory.logit_sums + at);
    }
    V loss = (largest - V::load(memory.target_logits + begin)) * V::broadcast(1 - smoothing_);
    if (smoothing_ != 0) {
      const V mean = logit_sum / V::broadcast(static_cast<T>(args_.classes));
      loss = mul_add(largest - mean, V::broadcast(smoothing_), loss);
    }
    T losses[kLanes];
    (loss + log(sum)).store(losses);
    for (int64_t i = 0; i < rows; ++i) {
      losses_[work.chunk.first + begin + i] = losses[i];
      // A target that is no class has no gradient either.
      if (std::isnan(memory.target_logits[begin + i])) memory.dlosses[begin + i] = memory.target_logits[begin + i];
    }
    const V scale = V::load(memory.dlosses + begin) / sum;
    for (int64_t at = begin; at < plan_.blocks * kChunkRows; at += kChunkRows) {
      (V::load(memory.maxima + at) * scale).store(memory.maxima + at);
    }
  }

  // The gradient of a slice's logits, and what it adds to dweight, dbias and the slice's dhidden.
  void make_gradients(const Work<P>& work, int64_t slice, const Scratch<X, P>& scratch) {
    const ChunkMemory<P>& memory = work.memory;
    const Chunk& chunk = work.chunk;
    if (chunk.rows == 0) return;
    T* const dhidden = plan_.slices > 1 ? memory.dhidden + slice * kChunkRows * plan_.pitch : nullptr;
    bool first_block = true;
    plan_.for_each_block(slice, [&](int64_t first_class, int64_t classes, int64_t block) {
      T* const dlogits = memory.logits + first_class * kChunkRows;
      const T* const factors = memory.maxima + block * kChunkRows;
      const V uniform = V::broadcast(smoothing_ / static_cast<T>(args_.classes));
      for (int64_t i = 0; i < classes; ++i) {
        T* const row = dlogits + i * kChunkRows;
        for (int64_t lane = 0; lane < chunk.rows; lane += kLanes) {
          const V p = V::load(row + lane) * V::load(factors + lane);
          (p - V::load(memory.dlosses + lane) * uniform).store(row + lane);
        }
      }
      for_each_target(chunk, first_class, classes, [&](int64_t row, int64_t target) {
        dlogits[target * kChunkRows + row] -= memory.dlosses[row] * (1 - smoothing_);
      });
      if (args_.dbias != nullptr) {
        for (int64_t i = 0; i < classes; ++i) {
          T* const to = work.partial.dbias + first_class + i;
          const T sum = row_sum(dlogits + i * kChunkRows, chunk.rows);
          *to = work.first ? sum : *to + sum;
        }
      }
      const auto [rows, columns_of_rows] = operands(dlogits, classes, chunk.rows, scratch);
      for (int64_t column = 0; column < args_.features; column += kDepth) {
        const int64_t columns = std::min(kDepth, args_.features - column);
        add_to_dweight(work, rows, first_class, classes, column, columns);
        pack_panels(scratch.weights, kWeightsStride, args_.weight + first_class * args_.weight_stride + column,
                    args_.weight_stride, classes, columns);
        fill_depth(scratch.weights, kWeightsStride, classes, columns);
        if (plan_.slices > 1) {
          add_to_dhidden(dhidden + column, columns_of_rows, scratch.weights, classes, chunk.rows, columns, first_block);
        } else {
          write_dhidden(chunk, columns_of_rows, scratch.weights, classes, column, columns);
        }
      }
      first_block = false;
    });
  }

  // dhidden of a lane group of rows: the sum over the slices, of which there are several.
  void add_slices(const Work<P>& work, int64_t begin) {
    for (int64_t row = begin; row < std::min(work.chunk.rows, begin + kLanes); ++row) {
      const T* const from = work.memory.dhidden + row * plan_.pitch;
      T* const to = args_.dhidden + plan_.kept[work.chunk.first + row] * args_.features;
      for (int64_t column = 0; column < args_.features; column += kLanes) {
        V sum = V::load(from + column);
        for (int64_t slice = 1; slice < plan_.slices; ++slice) {
          sum = sum + V::load(from + slice * kChunkRows * plan_.pitch + column);
        }
        sum.store_first(to + column, std::min(kLanes, args_.features - column));
      }
    }
  }

 private:
  using V = Vec<T>;
  using Rows = PackedFrom<X, E>;

  static constexpr int64_t kHiddenStride = P::depth(kChunkRows) * kLanes;  // of panels along the rows of a chunk
  static constexpr int64_t kWeightsStride = P::depth(P::kBlockClasses) * kLanes;

  void pack_lanes(const Work<P>& work, int64_t begin, const Rows* from, int64_t stride, int64_t rows) const {
    const ChunkMemory<P>& memory = work.memory;
    E* const columns = memory.columns + begin * P::depth(args_.features);
    if constexpr (std::is_same_v<E, T>) {
      pack_transposed(columns, from, stride, rows, args_.features);
    } else {
      pack_transposed(columns, from, stride, rows, args_.features, P::depth(args_.features));
    }
    if (!plan_.gradients) return;
    pack_panels(memory.panels + depth_of<E>(begin) * kLanes, kHiddenStride, from, stride, rows, args_.features);
    if (begin + rows == work.chunk.rows) fill_depth(memory.panels, kHiddenStride, begin + rows, args_.features);
  }

  // Zeros behind the first `count` numbers along the depth of the panels that hold `columns` columns.
  static void fill_depth(E* panels, int64_t stride, int64_t count, int64_t columns) {
    const int64_t first = depth_of<E>(count), last = P::depth(count);
    if (first == last) return;
    for (int64_t column = 0; column < columns; column += kLanes, panels += stride) {
      std::fill(panels + first * kLanes, panels + last * kLanes, E{});
    }
  }

  // `rows` rows of weight as they lie, the others zeros.
  void pack_weights(E* strip, const X* from, int64_t rows, int64_t depth) const {
    if constexpr (std::is_same_v<E, T>) {
      pack_rows<P::kStripRows, kPitch>(strip, from, args_.weight_stride, rows, depth, T(1));
    } else {
      for (int64_t row = 0; row < P::kStripRows; ++row, strip += kPitch, from += args_.weight_stride) {
        X* const to = reinterpret_cast<X*>(strip);
        const int64_t count = row < rows ? depth : 0;
        std::copy_n(from, count, to);
        std::fill(to + count, to + P::depth(depth) * Operand<E>::kDepth, X{});
      }
    }
  }

  // The gradient of a block's logits as the left operand of both products: of dweight, with rows of the chunk side by
  // side, and of dhidden, as P::Columns.
  std::pair<const E*, const E*> operands(const T* dlogits, int64_t classes, int64_t rows,
                                         const Scratch<X, P>& scratch) const {
    if constexpr (std::is_same_v<E, T>) {
      return {dlogits, dlogits};
    } else {
      P::round(scratch.dlogits, scratch.dlogits_columns, dlogits, classes, round_up(rows, kLanes));
      return {scratch.dlogits, scratch.dlogits_columns};
    }
  }

  // Calls body(row of the chunk, class of the block) for each row whose target is one of `classes` classes.
  template <typename Body>
  void for_each_target(const Chunk& chunk, int64_t first_class, int64_t classes, const Body& body) const {
    for (int64_t row = 0; row < chunk.rows; ++row) {
      const int64_t target = args_.targets[plan_.kept[chunk.first + row]] - first_class;
      if (target >= 0 && target < classes) body(row, target);
    }
  }

  void block_statistics(const ChunkMemory<P>& memory, T* logits, int64_t classes, int64_t at) const {
    // Not from -inf: where all logits are -inf they would be subtracted from themselves.
    V largest = V::broadcast(std::numeric_limits<T>::lowest());
    for (int64_t i = 0; i < classes; ++i) largest = max(V::load(logits + i * kChunkRows), largest);
    if (smoothing_ != 0) {
      V sum = V::zero();
      for (int64_t i = 0; i < classes; ++i) sum = sum + V::load(logits + i * kChunkRows);
      sum.store(memory.logit_sums + at);
    }
    V sum = V::zero();
    const V scale = V::broadcast(static_cast<T>(kLog2e));
    for (int64_t i = 0; i < classes; ++i) {
      const V p = exp2(V::load(logits + i * kChunkRows) - largest, scale);
      p.store(logits + i * kChunkRows);
      sum = sum + p;
    }
    largest.store(memory.maxima + at);
    sum.store(memory.sums + at);
  }

  static T row_sum(const T* row, int64_t n) {
    V sum = V::zero();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) sum = sum + V::load(row + i);
    if (i < n) sum = sum + V::load_first(row + i, n - i);
    return reduce_add(sum);
  }

  void add_to_dweight(const Work<P>& work, const E* dlogits, int64_t first_class, int64_t classes, int64_t column,
                      int64_t columns) const {
    P::template multiply<TileLayout<depth_of<E>(kChunkRows), 1>>(
        classes, depth_of<E>(work.chunk.rows), dlogits, work.memory.panels + column / kLanes * kHiddenStride,
        kHiddenStride, divide_up(columns, kLanes),
        [out = work.partial.dweight + first_class * args_.features + column, features = args_.features, classes,
         columns, first = work.first](int64_t row, int64_t panel, V sums) {
          if (row >= classes) return;
          T* const to = out + row * features + panel * kLanes;
          const int64_t width = columns - panel * kLanes;
          if (width >= kLanes) {
            (first ? sums : V::load(to) + sums).store(to);
          } else {
            (first ? sums : V::load_first(to, width) + sums).store_first(to, width);
          }
        });
  }

  void add_to_dhidden(T* dhidden, const E* dlogits, const E* weights, int64_t classes, int64_t rows, int64_t columns,
                      bool first) const {
    P::template multiply<typename P::Columns>(
        rows, depth_of<E>(classes), dlogits, weights, kWeightsStride, divide_up(columns, kLanes),
        [dhidden, pitch = plan_.pitch, first](int64_t row, int64_t panel, V sums) {
          T* const to = dhidden + row * pitch + panel * kLanes;
          (first ? sums : V::load(to) + sums).store(to);
        });
  }

  // The same where one block holds all classes: dhidden is written at once.
  void write_dhidden(const Chunk& chunk, const E* dlogits, const E* weights, int64_t classes, int64_t column,
                     int64_t columns) const {
    P::template multiply<typename P::Columns>(
        chunk.rows, depth_of<E>(classes), dlogits, weights, kWeightsStride, divide_up(columns, kLanes),
        [out = args_.dhidden + column, kept = plan_.kept.data() + chunk.first, features = args_.features,
         rows = chunk.rows, columns](int64_t row, int64_t panel, V sums) {
          if (row >= rows) return;
          T* const to = out + kept[row] * features + panel * kLanes;
          const int64_t width = columns - panel * kLanes;
          width >= kLanes ? sums.store(to) : sums.store_first(to, width);
        });
  }

  static T load_number(const X* p) {
    T lanes[kLanes];
    V::load_first(p, 1).store(lanes);
    return lanes[0];
  }

  const LinearCrossEntropy<X>& args_;
  const Plan& plan_;
  const T smoothing_;
  T* const losses_;
};

}  // namespace leedl
