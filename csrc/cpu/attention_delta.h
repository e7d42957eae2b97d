// Attention, backward: what all tasks share, what is made before the first of them begins (delta), and the gradient of
// the sinks, which is made of it.
#pragma once

#include <numeric>

#include "attention_backward_plan.h"
#include "attention_bias_gradient.h"
#include "attention_scores.h"

namespace leedl {

// What all tasks share.
template <typename T>
struct BackwardShared {
  using A = Accumulate<T>;

  const AttentionBackward<T>& args;
  const Scores<T>& scores;
  BiasGradient<A>& bias_gradient;
  A* delta;       // (batch, num_heads, seqlen_q), divided by Scores::kept
  A* dq;          // (batch, num_heads, seqlen_q, panels * W): sums so far, where dq itself has two bytes
  A* sink_parts;  // what each block of queries adds to dsinks
  Turn* turns;    // of each block of queries: how many tasks have added to its dq
};

// Fills delta for one block of queries, and zeroes the dq of strips that no task will write. The products are summed in
// the order in which a tile sums dout . V^T: where a row's softmax is nearly one-hot, their difference must not be one
// of roundings.
template <typename T>
void prepare_block(const BackwardShared<T>& shared, const Sample& sample, int64_t head, int64_t row_begin,
                   int64_t row_end, int64_t block) {
  using A = Accumulate<T>;
  constexpr int64_t kLanes = Vec<A>::kSize;
  const AttentionBackward<T>& args = shared.args;
  const AttentionSizes& s = args.options.sizes;
  alignas(64) A dout[kMaxHeadDim * kLanes], out[kMaxHeadDim * kLanes];  // [head_dim_v][W]
  const Vec<A> kept = Vec<A>::broadcast(shared.scores.kept());
  Vec<A> sink_sum = Vec<A>::zero();
  for (int64_t row = row_begin; row < row_end && shared.scores.softmax(); row += kLanes) {
    const int64_t rows = std::min(kLanes, row_end - row);
    const int64_t index = args.options.statistics_index(sample, head, row);
    pack_transposed(dout, args.dout.query(sample, head, row), args.dout.seq_stride, rows, s.head_dim_v);
    pack_transposed(out, args.out.query(sample, head, row), args.out.seq_stride, rows, s.head_dim_v);
    Vec<A> sum = Vec<A>::zero();
    const int64_t run = (s.head_dim_v + shared.scores.gradient_runs() - 1) / shared.scores.gradient_runs();
    for (int64_t begin = 0; begin < s.head_dim_v; begin += run) {
      Vec<A> part = Vec<A>::zero();
      for (int64_t column = begin; column < std::min(begin + run, s.head_dim_v); ++column) {
        Vec<A> o = Vec<A>::load(out + column * kLanes);
        if (shared.scores.drops()) o = o / kept;
        part = mul_add(Vec<A>::load(dout + column * kLanes), o, part);
      }
      sum = begin == 0 ? part : sum + part;
    }
    sum.store_first(shared.delta + index, rows);
    if (shared.scores.has_sinks()) {
      const Vec<A> dlse = args.dlse == nullptr ? Vec<A>::zero() : Vec<A>::load_first(args.dlse + index, rows);
      const Vec<A> distance =
          Vec<A>::broadcast(shared.scores.sink(head)) - Vec<A>::load_first(args.row_max + index, rows);
      const Vec<A> probability = exp2(distance, Vec<A>::broadcast(shared.scores.scale().factor)) /
                                 Vec<A>::load_first(args.row_sum + index, rows);
      sink_sum = sink_sum + keep_lanes(0, rows, probability * (dlse - sum * kept), Vec<A>::zero());
    }
  }
  shared.sink_parts[block] = reduce_add(sink_sum);
  const AttentionWindow& window = sample.window;
  for (int64_t row = row_begin; row < row_end; row += kStripRows) {
    const int64_t end = std::min(row + kStripRows, row_end);
    if (window.key_begin(row) < window.key_end_of(end - 1)) continue;
    for (int64_t r = row; r < end; ++r) std::fill_n(args.dq.query(sample, head, r), s.head_dim, T{});
  }
}

// dsinks out of the parts of every block of queries, added up in their order.
template <typename T>
void sum_sinks(const BackwardShared<T>& shared, const Segments<BackwardPlan>& segments) {
  const int64_t heads = shared.args.options.sizes.num_heads;
  for (int64_t head = 0; head < heads; ++head) {
    double sum = 0;
    for (const Segment<BackwardPlan>& segment : segments) {
      const int64_t blocks = segment.plan.query_blocks;
      for (int64_t sample = 0; sample < segment.samples; ++sample) {
        const Accumulate<T>* parts = shared.sink_parts + segment.first_block + (sample * heads + head) * blocks;
        sum = std::accumulate(parts, parts + blocks, sum);
      }
    }
    shared.args.dsinks[head] = static_cast<Accumulate<T>>(sum);
  }
}

}  // namespace leedl
