// Attention, backward: from scores to P and dS, and the sums that become dq, dk and dv.
#pragma once

#include "attention_products.h"

namespace leedl {

// What turns the scores of the rows of a strip into P and dS.
template <typename A>
struct RowStatistics {
  alignas(64) A row_max[kStripRows], row_sum[kStripRows];
  alignas(64) A delta[kStripRows], dlse[kStripRows];
  A factor, kept;  // of all rows; see ScoreScale and Scores
};

namespace detail {

// P, the very numbers of the forward pass, and dS of one row.
template <typename A>
class RowGradient {
 public:
  RowGradient(const RowStatistics<A>& rows, int64_t row)
      : scale_(Vec<A>::broadcast(rows.factor)),
        offset_(Vec<A>::broadcast(rows.row_max[row])),
        // A double has no better reference than plain PyTorch, which rounds once here.
        sum_(Vec<A>::broadcast(sizeof(A) == 8 ? rows.row_sum[row] : 1 / rows.row_sum[row])),
        mean_(Vec<A>::broadcast(rows.delta[row])),
        gain_(Vec<A>::broadcast(rows.kept)),
        shift_(Vec<A>::broadcast(rows.dlse[row])) {}

  Vec<A> probability(Vec<A> score) const {
    const Vec<A> exponential = exp2(score - offset_, scale_);
    return sizeof(A) == 8 ? exponential / sum_ : exponential * sum_;
  }
  // dp: dout . V^T, where dropout keeps it.
  Vec<A> score_gradient(Vec<A> probability, Vec<A> dp) const {
    return probability * mul_add(dp - mean_, gain_, shift_);
  }

 private:
  const Vec<A> scale_, offset_, sum_, mean_, gain_, shift_;
};

}  // namespace detail

// One row: scores become P, dout . V^T becomes dS.
template <typename A>
__attribute__((noinline)) void score_gradients(const RowStatistics<A>& rows, int64_t row, int64_t columns,
                                               A* __restrict__ p, A* __restrict__ ds) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  const detail::RowGradient<A> gradient(rows, row);
  for (int64_t column = 0; column < columns; column += kLanes) {
    const Vec<A> probability = gradient.probability(Vec<A>::load(p + column));
    probability.store(p + column);
    gradient.score_gradient(probability, Vec<A>::load(ds + column)).store(ds + column);
  }
}

#if defined(__AVX512F__)

// The same for two rows at once, straight to pairs: of both rows for p and ds, of neighbours for each row of ds_rows,
// kScorePitch apart. Without a second row its numbers are zeros.
__attribute__((noinline)) inline void score_gradients(const RowStatistics<float>& rows, int64_t row, int64_t columns,
                                                      const float* __restrict__ scores, const float* __restrict__ dp,
                                                      BFloat16Pair* __restrict__ p, BFloat16Pair* __restrict__ ds,
                                                      BFloat16Pair* __restrict__ ds_rows) {
  using V = Vec<float>;
  constexpr int64_t kLanes = V::kSize;
  const detail::RowGradient<float> first(rows, row), second(rows, row + 1);
  const auto gradients = [&](int64_t column, V (&s)[2]) __attribute__((always_inline)) {
    const V p0 = first.probability(V::load(scores + column));
    const V p1 = second.probability(V::load(scores + kScorePitch + column));
    s[0] = first.score_gradient(p0, V::load(dp + column));
    s[1] = second.score_gradient(p1, V::load(dp + kScorePitch + column));
    store_columns(p + column, p0, p1);
    store_columns(ds + column, s[0], s[1]);
  };
  for (int64_t column = 0; column < columns; column += 2 * kLanes) {
    V left[2], right[2] = {V::zero(), V::zero()};
    gradients(column, left);
    if (column + kLanes < columns) gradients(column + kLanes, right);
    store_pairs(ds_rows + column / 2, left[0], right[0]);
    store_pairs(ds_rows + kScorePitch + column / 2, left[1], right[1]);
  }
}

#endif

// to = sums + scale * from, or scale * from where sums is null, for `rows` rows. Rows of `from` are `panels` vectors
// apart.
template <typename A, typename To>
void add_scaled(int64_t rows, int64_t columns, const A* from, int64_t panels, A scale, const A* sums,
                int64_t sums_stride, To* to, int64_t to_stride) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  const Vec<A> factor = Vec<A>::broadcast(scale);
  const int64_t whole = columns / kLanes * kLanes, rest = columns - whole;
  for (int64_t row = 0; row < rows; ++row, from += panels * kLanes, to += to_stride) {
    if (sums == nullptr) {
      for (int64_t column = 0; column < whole; column += kLanes) {
        (Vec<A>::load(from + column) * factor).store(to + column);
      }
      if (rest > 0) (Vec<A>::load(from + whole) * factor).store_first(to + whole, rest);
      continue;
    }
    for (int64_t column = 0; column < whole; column += kLanes) {
      mul_add(Vec<A>::load(from + column), factor, Vec<A>::load(sums + column)).store(to + column);
    }
    if (rest > 0) {
      mul_add(Vec<A>::load(from + whole), factor, Vec<A>::load_first(sums + whole, rest)).store_first(to + whole, rest);
    }
    sums += sums_stride;
  }
}

}  // namespace leedl
