// What stands between q . k and the probabilities: scale, softcap, bias, slopes, masks, normalizers and dropout.
//
// Without softcap, bias, slopes, sinks and other normalizers than softmax nothing modifies a score, and the scale goes
// into the exponential: plain attention makes no pass over its scores but the softmax.
#pragma once

#include <limits>

#include "attention.h"
#include "philox_simd.h"

namespace leedl {

// Scores are kept as sign * q . k, so that their maximum is also that of the scaled scores, and
// exp(softmax_scale * (q . k - maximum)) = exp2((score - maximum) * factor): the difference comes first, so that large
// scores lose no more than they must. Modified scores are S itself, see leedl_fast/reference/attention.py.
template <typename A>
struct ScoreScale {
  A sign;       // what queries are multiplied by: 1, -1, or 0 for a scale of 0
  A magnitude;  // |softmax_scale|: of what a tile makes, and of scores that are not modified
  A lse_scale;  // what the maximum of the scores is multiplied by for the logarithm of the sum
  A factor;     // lse_scale * log2(e), or any positive number for a scale of 0, so that it leaves -inf alone

  ScoreScale(double softmax_scale, bool modified)
      : sign(static_cast<A>((softmax_scale > 0) - (softmax_scale < 0))),
        magnitude(static_cast<A>(std::abs(softmax_scale))),
        lse_scale(modified ? A(1) : magnitude),
        factor(static_cast<A>(modified             ? kLog2e
                              : softmax_scale == 0 ? 1
                                                   : std::abs(softmax_scale) * kLog2e)) {}
};

inline Vec<double> softcap_tanh(Vec<double> x) {
  for (int64_t i = 0; i < Vec<double>::kSize; ++i) x.lanes[i] = std::tanh(x.lanes[i]);
  return x;
}

// tanh(x) = e / (e + 2) with e = exp(2x) - 1, which is made without a difference where x is small; NaN stays NaN.
inline Vec<float> softcap_tanh(Vec<float> x) {
  using C = detail::Exp2<float>;
  using V = Vec<float>;
  const V one = V::broadcast(1), limit = V::broadcast(64), round = V::broadcast(C::kRound);
  const V y = max(-limit, min(limit, x * V::broadcast(static_cast<float>(2 * kLog2e))));
  const V shifted = y + round;
  const V fraction = y - (shifted - round);
  V series = V::broadcast(C::kCoefficients[0]);
#pragma GCC unroll 16
  for (size_t i = 1; i + 1 < sizeof(C::kCoefficients) / sizeof(float); ++i) {
    series = mul_add(series, fraction, V::broadcast(C::kCoefficients[i]));
  }
  const V power{reinterpret_cast<V::Lanes>(reinterpret_cast<V::Bits>(shifted.lanes) << C::kExponentShift)};
  const V e = mul_add(power, series * fraction, power - one);
  return e / (e + one + one);
}

// 1 / (1 + exp(-x)), exactly 0 where it is below 2^-100.
template <typename A>
inline Vec<A> sigmoid(Vec<A> x) {
  const Vec<A> one = Vec<A>::broadcast(1);
  const Vec<A> y = min(Vec<A>::broadcast(120), x * Vec<A>::broadcast(static_cast<A>(-kLog2e)));
  return zero_below(x, A(-100 / kLog2e), one / (one + exp2(y)));
}

template <typename T>
class Scores {
 public:
  using A = Accumulate<T>;

  Scores(const AttentionOptions& options, const ScoreTerms<T>& terms)
      : options_(options),
        terms_(terms),
        normalizer_(options.normalizer),
        modified_(options.softcap != 0 || terms.bias.data != nullptr || terms.sinks != nullptr ||
                  terms.alibi_slopes != nullptr || normalizer_ != Normalizer::kSoftmax),
        scale_(options.softmax_scale, modified_),
        softcap_(static_cast<A>(options.softcap)),
        into_cap_(static_cast<A>(options.softcap == 0 ? 0 : std::abs(options.softmax_scale) / options.softcap)),
        dropout_(options.dropout_p, options.seed == nullptr ? 0 : static_cast<uint64_t>(*options.seed)) {}

  const ScoreScale<A>& scale() const { return scale_; }
  bool modified() const { return modified_; }
  bool softmax() const { return normalizer_ == Normalizer::kSoftmax; }
  bool capped() const { return softcap_ != 0; }
  bool drops() const { return options_.dropout_p > 0; }
  bool has_sinks() const { return terms_.sinks != nullptr; }
  // What dropout multiplies the probabilities by that it keeps. It multiplies sums of them, not each: where a row's
  // softmax is nearly one-hot, dP - delta must not be a difference of roundings.
  A kept() const { return static_cast<A>(1 / (1 - options_.dropout_p)); }
  // Runs in which dout . v and delta are summed. Bias, slopes and caps make rows nearly one-hot, where dP - delta
  // shows every rounding of either.
  int64_t gradient_runs() const { return modified_ || sizeof(A) == 8 ? 4 : 1; }
  A sink(int64_t head) const { return terms_.sinks[head]; }

  // What a row's maximum and sum are before its first key.
  void start(int64_t head, A* row_max, A* row_sum) const {
    const A first = has_sinks() ? sink(head) : -std::numeric_limits<A>::infinity();
    std::fill_n(row_max, kStripRows, first);
    std::fill_n(row_sum, kStripRows, A(!softmax() || first > -std::numeric_limits<A>::infinity()));
  }

  // sign * q . k of one query with the keys from `origin` on becomes S. What d cap(Z) / dZ is goes to `slopes` when that
  // is not null and scores are capped. Keys from seqlen_k on get numbers that mean nothing.
  void modify(const Sample& sample, int64_t head, int64_t row, int64_t origin, int64_t columns, A* scores,
              A* slopes) const {
    const Vec<A> one = Vec<A>::broadcast(1);
    if (capped()) {
      const Vec<A> scale = Vec<A>::broadcast(into_cap_), most = Vec<A>::broadcast(softcap_);
      for (int64_t column = 0; column < columns; column += kLanes) {
        const Vec<A> x = softcap_tanh(Vec<A>::load(scores + column) * scale);
        (x * most).store(scores + column);
        if (slopes != nullptr) (one - x * x).store(slopes + column);
      }
    } else {
      const Vec<A> scale = Vec<A>::broadcast(scale_.magnitude);
      for (int64_t column = 0; column < columns; column += kLanes) {
        (Vec<A>::load(scores + column) * scale).store(scores + column);
      }
    }
    if (terms_.bias.data != nullptr) {
      const T* bias = terms_.bias.row(sample.batch, head, row) + origin;
      const int64_t inside = std::min(columns, sample.seqlen_k - origin);
      int64_t column = 0;
      for (; column + kLanes <= inside; column += kLanes) {
        (Vec<A>::load(scores + column) + Vec<A>::load(bias + column)).store(scores + column);
      }
      if (column < inside) {
        (Vec<A>::load(scores + column) + Vec<A>::load_first(bias + column, inside - column)).store(scores + column);
      }
    }
    if (terms_.alibi_slopes != nullptr) {
      const A slope = terms_.alibi_slopes[sample.index * terms_.alibi_sample_stride + head];
      const auto lane = detail::lane_numbers<A>(std::make_index_sequence<kLanes>());
      const Vec<A> lanes{__builtin_convertvector(lane, typename Vec<A>::Lanes)};
      for (int64_t column = 0; column < columns; column += kLanes) {
        const Vec<A> ahead = lanes + Vec<A>::broadcast(static_cast<A>(origin + column - row - sample.window.shift));
        const Vec<A> distance = max(ahead, -ahead);
        (Vec<A>::load(scores + column) - Vec<A>::broadcast(slope) * distance).store(scores + column);
      }
    }
  }

  // relu or sigmoid of one row of S.
  void activate(A* scores, int64_t columns) const {
    for (int64_t column = 0; column < columns; column += kLanes) {
      const Vec<A> s = Vec<A>::load(scores + column);
      (normalizer_ == Normalizer::kRelu ? max(s, Vec<A>::zero()) : sigmoid(s)).store(scores + column);
    }
  }

  // The same from S in `p`, and dS from dP / kept() in `ds`.
  void activate_backward(A* p, A* ds, int64_t columns) const {
    const Vec<A> one = Vec<A>::broadcast(1), scale = Vec<A>::broadcast(kept());
    for (int64_t column = 0; column < columns; column += kLanes) {
      const Vec<A> s = Vec<A>::load(p + column), dp = Vec<A>::load(ds + column) * scale;
      if (normalizer_ == Normalizer::kRelu) {
        max(s, Vec<A>::zero()).store(p + column);
        Vec<A>{s.lanes > 0 ? dp.lanes : Vec<A>::zero().lanes}.store(ds + column);
      } else {
        const Vec<A> y = sigmoid(s);
        y.store(p + column);
        (dp * (y * (one - y))).store(ds + column);
      }
    }
  }

  // 1 where dropout keeps the probability of one query, and 0 elsewhere, for the keys [origin, origin + columns).
  void dropout_factors(const Sample& sample, int64_t head, int64_t row, int64_t origin, int64_t columns,
                       A* factors) const {
    dropout_.fill(origin, columns, row, sample.index * options_.sizes.num_heads + head, factors);
  }

 private:
  static constexpr int64_t kLanes = Vec<A>::kSize;

  const AttentionOptions& options_;
  const ScoreTerms<T>& terms_;
  const Normalizer normalizer_;
  const bool modified_;
  const ScoreScale<A> scale_;
  const A softcap_, into_cap_;  // the latter takes a tile's score to the argument of tanh
  const Dropout<A> dropout_;
};

template <typename A>
inline void multiply_row(A* row, const A* factors, int64_t columns) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  for (int64_t column = 0; column < columns; column += kLanes) {
    (Vec<A>::load(row + column) * Vec<A>::load(factors + column)).store(row + column);
  }
}

}  // namespace leedl
