// How a row of attention's output and its statistics are written.
#pragma once

#include <limits>

#include "attention_scores.h"

namespace leedl {

template <typename T>
class RowWriter {
 public:
  using A = Accumulate<T>;

  RowWriter(const AttentionForward<T>& args, const Scores<T>& scores) : args_(args), scores_(scores) {}

  // out = sums * factor.
  void write(const Sample& sample, int64_t head, int64_t row, const A* sums, A factor, A lse, A row_max,
             A row_sum) const {
    constexpr int64_t kLanes = Vec<A>::kSize;
    const int64_t head_dim = args_.options.sizes.head_dim_v;
    T* to = args_.out.query(sample, head, row);
    const Vec<A> scale = Vec<A>::broadcast(factor);
    int64_t column = 0;
    for (; column + kLanes <= head_dim; column += kLanes) (Vec<A>::load(sums + column) * scale).store(to + column);
    if (column < head_dim) (Vec<A>::load(sums + column) * scale).store_first(to + column, head_dim - column);
    write_statistics(sample, head, row, lse, row_max, row_sum);
  }

  // A row that sees no key, but perhaps a sink.
  void write_masked(const Sample& sample, int64_t head, int64_t row) const {
    std::fill_n(args_.out.query(sample, head, row), args_.options.sizes.head_dim_v, T{});
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    const A sink = scores_.has_sinks() ? scores_.sink(head) : -kInfinity;
    write_statistics(sample, head, row, sink, sink > -kInfinity ? sink : kInfinity, A(1));
  }

 private:
  void write_statistics(const Sample& sample, int64_t head, int64_t row, A lse, A row_max, A row_sum) const {
    if (args_.lse == nullptr) return;
    const int64_t index = args_.options.statistics_index(sample, head, row);
    args_.lse[index] = lse;
    args_.row_max[index] = row_max;
    args_.row_sum[index] = row_sum;
  }

  const AttentionForward<T>& args_;
  const Scores<T>& scores_;
};

}  // namespace leedl
