// The online softmax over the rows of a strip: between the two products of attention, forward.
#pragma once

#include <limits>

#include "attention_products.h"

namespace leedl {

// Replaces the scores of kStripRows rows by exp2((score - maximum) * factor), where the maximum includes that of
// earlier blocks; adds to the sums; rescale[row] is what outputs and sums so far must be multiplied by. Rows go in
// pairs, so that two chains of maxima or sums run side by side.
template <typename T>
__attribute__((noinline)) inline void softmax_rows(T* scores, int64_t columns, T factor, T* row_max, T* row_sum,
                                                   T* rescale) {
  static_assert(kStripRows % 2 == 0);
  constexpr int64_t kLanes = Vec<T>::kSize;
  alignas(64) T largest[kStripRows], offsets[kStripRows], sums[kStripRows] = {};
  std::copy(row_max, row_max + kStripRows, largest);
  const Vec<T> scale = Vec<T>::broadcast(factor);
  for (int64_t row = 0; row < kStripRows; row += 2) {
    const T* score = scores + row * kScorePitch;
    Vec<T> top0 = Vec<T>::broadcast(row_max[row]), top1 = Vec<T>::broadcast(row_max[row + 1]);
    Vec<T> odd0 = top0, odd1 = top1;
    int64_t column = 0;
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
      top0 = max(Vec<T>::load(score + column), top0);
      odd0 = max(Vec<T>::load(score + column + kLanes), odd0);
      top1 = max(Vec<T>::load(score + kScorePitch + column), top1);
      odd1 = max(Vec<T>::load(score + kScorePitch + column + kLanes), odd1);
    }
    if (column < columns) {
      top0 = max(Vec<T>::load(score + column), top0);
      top1 = max(Vec<T>::load(score + kScorePitch + column), top1);
    }
    largest[row] = reduce_max(max(odd0, top0));
    largest[row + 1] = reduce_max(max(odd1, top1));
  }
  for (int64_t row = 0; row < kStripRows; row += kLanes) {
    // A row that has seen no key yet keeps -inf, but subtracts 0: -inf - -inf would be NaN.
    const Vec<T> now = Vec<T>::load(largest + row);
    const Vec<T> offset = zero_below(now, std::numeric_limits<T>::lowest(), now);
    exp2(Vec<T>::load(row_max + row) - offset, scale).store(rescale + row);
    offset.store(offsets + row);
    now.store(row_max + row);
  }
  for (int64_t row = 0; row < kStripRows; row += 2) {
    T* score = scores + row * kScorePitch;
    const Vec<T> offset0 = Vec<T>::broadcast(offsets[row]), offset1 = Vec<T>::broadcast(offsets[row + 1]);
    Vec<T> sum0 = Vec<T>::zero(), sum1 = Vec<T>::zero();
    for (int64_t column = 0; column < columns; column += kLanes) {
      const Vec<T> p0 = exp2(Vec<T>::load(score + column) - offset0, scale);
      const Vec<T> p1 = exp2(Vec<T>::load(score + kScorePitch + column) - offset1, scale);
      p0.store(score + column);
      p1.store(score + kScorePitch + column);
      sum0 = sum0 + p0;
      sum1 = sum1 + p1;
    }
    sums[row] = reduce_add(sum0);
    sums[row + 1] = reduce_add(sum1);
  }
  for (int64_t row = 0; row < kStripRows; row += kLanes) {
    mul_add(Vec<T>::load(row_sum + row), Vec<T>::load(rescale + row), Vec<T>::load(sums + row)).store(row_sum + row);
  }
}

// What a row of sums becomes when the maximum moves.
template <typename A>
inline void scale_row(A* row, int64_t columns, A factor) {
  const Vec<A> scale = Vec<A>::broadcast(factor);
  for (int64_t column = 0; column < columns; column += Vec<A>::kSize) {
    (Vec<A>::load(row + column) * scale).store(row + column);
  }
}

}  // namespace leedl
