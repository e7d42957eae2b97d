// Additive attention on the CPU: what forward and backward share, above all the scores.
//
// With e = exp(2 q) exp(2 k), of exponentials made once per number of q and of k, and r = 1 / (1 + e),
//     tanh(q + k) = 2 y        1 - tanh(q + k)^2 = 4 (1/4 - y^2)        where y = 1/2 - r.
// Where numbers are so large that the product could leave its range, e is made of q + k itself.
//
// Work is cut into strips of kTileRows queries and blocks of keys, both at multiples of their sizes, so that no result
// depends on how they are handed to threads. Scores are vectors over keys: nothing is summed across lanes.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention.h"
#include "dtypes.h"
#include "packing.h"
#include "simd.h"

namespace leedl {

constexpr int64_t kAdditiveBlockKeys = 128;
// Rows of scores are an odd number of cache lines of floats apart, so that they spread over the cache's sets, and leave
// room for a tile of kTileRows columns that begins at the last key.
constexpr int64_t kAdditivePitch = kAdditiveBlockKeys + 16;
static_assert(kTileRows <= 16);
// Terms are summed in runs of so many, and then the runs, with what each addition rounds off.
constexpr int64_t kAdditiveRun = 8;

// The keys [begin, end) that some queries see, and the blocks that hold them.
struct SeenKeys {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
  int64_t first_block() const { return begin / kAdditiveBlockKeys; }
  int64_t last_block() const { return (end - 1) / kAdditiveBlockKeys; }
  // The seen keys of one of the blocks, counted in it.
  int64_t begin_in(int64_t block) const { return std::max<int64_t>(begin - block * kAdditiveBlockKeys, 0); }
  int64_t end_in(int64_t block) const { return std::min(end - block * kAdditiveBlockKeys, kAdditiveBlockKeys); }
};

struct AdditiveProblem {
  AttentionSizes sizes;
  const int64_t* key_lengths;  // (batch), or null
  int64_t window_left, window_right;
  int num_threads;

  AttentionWindow window(int64_t batch) const {
    int64_t key_end = sizes.seqlen_k;
    if (key_lengths != nullptr) key_end = std::clamp<int64_t>(key_lengths[batch], 0, sizes.seqlen_k);
    return {sizes.seqlen_q, key_end, sizes.seqlen_k - sizes.seqlen_q, window_left, window_right};
  }
  int64_t strips() const { return (sizes.seqlen_q + kTileRows - 1) / kTileRows; }
  int64_t key_blocks() const { return (sizes.seqlen_k + kAdditiveBlockKeys - 1) / kAdditiveBlockKeys; }
  // Blocks of keys that so many queries in a row see at most.
  int64_t seen_blocks(int64_t rows) const {
    return std::min(key_blocks(), (window_left + window_right + rows) / kAdditiveBlockKeys + 2);
  }
  // Keys of a block in memory: whole vectors, and no more than there are.
  template <typename A>
  int64_t block_keys() const {
    return std::min(kAdditiveBlockKeys, round_up(std::max<int64_t>(sizes.seqlen_k, 1), Vec<A>::kSize));
  }
};

template <typename T>
struct AdditiveForward {
  AdditiveProblem problem;
  HeadTensor<T> out;
  // (batch, num_heads, seqlen_q), contiguous: of S; inf and 1 where no key is seen; both null unless wanted
  Accumulate<T>* row_max;
  Accumulate<T>* row_sum;
  HeadTensor<const T> q, k, v;
  const T* score_weight;  // (num_heads, head_dim), contiguous
};

template <typename T>
struct AdditiveBackward {
  AdditiveProblem problem;
  HeadTensor<T> dq, dk, dv;
  Accumulate<T>* dscore_weight;  // (num_heads, head_dim), contiguous
  HeadTensor<const T> dout, q, k, v, out;
  const T* score_weight;
  const Accumulate<T>* row_max;
  const Accumulate<T>* row_sum;
};

template <typename T>
void additive_attention_forward(const AdditiveForward<T>& args);
template <typename T>
void additive_attention_backward(const AdditiveBackward<T>& args);

// Rows of a tensor as numbers of A, `pitch` apart, a multiple of W; zeros up to the pitch.
template <typename A, typename T>
inline void load_rows(A* to, int64_t pitch, const T* from, int64_t stride, int64_t rows, int64_t columns) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  for (int64_t row = 0; row < rows; ++row, to += pitch, from += stride) {
    int64_t column = 0;
    for (; column + kLanes <= columns; column += kLanes) Vec<A>::load(from + column).store(to + column);
    for (; column < pitch; column += kLanes) {
      Vec<A>::load_first(from + column, std::max<int64_t>(columns - column, 0)).store(to + column);
    }
  }
}

// Whether all numbers lie in [-20, 20], where the product of two exponentials exp(2 x) is far from the range's ends.
template <typename A>
inline bool are_bounded(const A* x, int64_t count) {
  Vec<A> inside = Vec<A>::broadcast(1);
  for (int64_t i = 0; i < count; i += Vec<A>::kSize) {
    const Vec<A> value = Vec<A>::load(x + i), magnitude = max(value, -value);  // NaN stays NaN
    inside.lanes = magnitude.lanes <= Vec<A>::broadcast(20).lanes ? inside.lanes : Vec<A>::zero().lanes;
  }
  return reduce_add(inside) == static_cast<A>(Vec<A>::kSize);
}

// exp(kFactor x), for kFactor x < 88, within little more than half an ulp: an error of exp(2 k) is one of all scores of
// that key alike. The fraction of kFactor log2(e) x is made without rounding the product.
template <int kFactor, typename A>
inline Vec<A> exponential(Vec<A> x) {
  using C = detail::Exp2<A>;
  constexpr long double kScale = kFactor * 1.44269504088896340735992468100189214L;
  const Vec<A> scale = Vec<A>::broadcast(static_cast<A>(kScale)), round = Vec<A>::broadcast(C::kRound);
  const Vec<A> rest = Vec<A>::broadcast(static_cast<A>(kScale - static_cast<long double>(static_cast<A>(kScale))));
  const Vec<A> exponent = x * scale, shifted = exponent + round;
  const Vec<A> fraction = mul_add(x, rest, fma(x, scale, round - shifted));
  return zero_below(exponent, C::kLowest, detail::exp2_scaled(fraction, shifted));
}

// x = exp(2 x).
template <typename A>
inline void exponentials(A* x, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec<A>::kSize) exponential<2>(Vec<A>::load(x + i)).store(x + i);
}

// tanh(x) / 2 of e = exp(2 x) <= 2^120, nearly as exact as tanh itself: a guess g of 1 / (1 + e) is corrected by
// g (1 - (1 + e) g), where 1 + e is not rounded: (1 - g) - e g.
template <typename A>
inline Vec<A> half_tanh(Vec<A> e) {
  const Vec<A> one = Vec<A>::broadcast(1);
  Vec<A> guess;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    guess.lanes = _mm512_maskz_rcp14_ps(0xffff, (one + e).lanes);  // relative error 2^-14
  } else {
    guess = one / (one + e);
  }
#else
  guess = one / (one + e);
#endif
  const Vec<A> rest = mul_add(-e, guess, one - guess);
  return mul_add(-guess, rest, Vec<A>::broadcast(static_cast<A>(0.5)) - guess);
}

// exp(2 (q + k)) whatever q and k, infinities included, but no more than 2^60, which is far above where tanh is 1; NaN
// where q + k is.
template <typename A>
inline Vec<A> direct_exponential(Vec<A> q, Vec<A> k) {
  // min returns its second argument where that is NaN.
  return exp2(min(Vec<A>::broadcast(60), (q + k) * Vec<A>::broadcast(static_cast<A>(2 * kLog2e))));
}

// The score weights of all heads; zeros up to the pitch.
template <typename T>
class ScoreWeights {
 public:
  using A = Accumulate<T>;

  ScoreWeights(const T* score_weight, const AttentionSizes& s)
      : pitch_(round_up(s.head_dim, Vec<A>::kSize)), weights_(allocate<A>(s.num_heads * pitch_)) {
    load_rows(weights_.get(), pitch_, score_weight, s.head_dim, s.num_heads, s.head_dim);
  }

  int64_t pitch() const { return pitch_; }
  const A* head(int64_t head) const { return weights_.get() + head * pitch_; }

 private:
  int64_t pitch_;
  Buffer<A> weights_;
};

// Rows of queries, `pitch` apart: q, and exp(2 q) if they are bounded.
template <typename A>
struct QueryRows {
  const A* plain;
  const A* powers;
  int64_t rows, pitch;
  bool bounded;
};

// Loads rows of q.
template <typename A, typename T>
inline QueryRows<A> load_queries(const T* q, int64_t stride, int64_t rows, int64_t head_dim, int64_t pitch, A* plain,
                                 A* powers) {
  load_rows(plain, pitch, q, stride, rows, head_dim);
  const bool bounded = are_bounded(plain, rows * pitch);
  if (bounded) {
    std::copy_n(plain, rows * pitch, powers);
    exponentials(powers, rows * pitch);
  }
  return {plain, powers, rows, pitch, bounded};
}

// The first `count` lanes, or all where there are fewer.
template <typename A, typename T>
inline void store_columns(Vec<A> value, T* to, int64_t count) {
  if (count >= Vec<A>::kSize) {
    value.store(to);
  } else {
    value.store_first(to, count);
  }
}

namespace detail {

// made_of(q, k) is exp(2 (q + k)) of a query's and a key's number as they are held.
template <int64_t kRows, int64_t kVecs, typename A, typename Exponential>
inline __attribute__((always_inline)) void additive_tile(int64_t head_dim, const A* __restrict__ q, int64_t pitch,
                                                         const A* __restrict__ weights, const A* __restrict__ panel,
                                                         A* __restrict__ scores, const Exponential& made_of) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  Vec<A> totals[kRows][kVecs] = {}, rests[kRows][kVecs] = {};
#pragma GCC unroll 1
  for (int64_t c = 0; c < head_dim;) {
    Vec<A> sums[kRows][kVecs] = {};
    const int64_t run_end = std::min(c + kAdditiveRun, head_dim);
#pragma GCC unroll 1
    for (; c < run_end; ++c) {
      const Vec<A> weight = Vec<A>::broadcast(weights[c]);
      Vec<A> keys[kVecs];
#pragma GCC unroll 4
      for (int64_t vec = 0; vec < kVecs; ++vec) keys[vec] = Vec<A>::load(panel + (vec * pitch + c) * kLanes);
#pragma GCC unroll 4
      for (int64_t row = 0; row < kRows; ++row) {
        const Vec<A> query = Vec<A>::broadcast(q[row * pitch + c]);
#pragma GCC unroll 4
        for (int64_t vec = 0; vec < kVecs; ++vec) {
          sums[row][vec] = mul_add(weight, half_tanh(made_of(query, keys[vec])), sums[row][vec]);
        }
      }
    }
#pragma GCC unroll 4
    for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int64_t vec = 0; vec < kVecs; ++vec) {
        const Vec<A> before = totals[row][vec], run = sums[row][vec], after = before + run, added = after - before;
        rests[row][vec] = rests[row][vec] + ((before - (after - added)) + (run - added));
        totals[row][vec] = after;
      }
    }
  }
#pragma GCC unroll 4
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int64_t vec = 0; vec < kVecs; ++vec) {
      ((totals[row][vec] + rests[row][vec]) * Vec<A>::broadcast(2)).store(scores + row * kAdditivePitch + vec * kLanes);
    }
  }
}

// The scores of `rows` queries and `count` panels of keys.
template <typename A, typename Exponential>
inline void additive_scores(const A* q, int64_t rows, int64_t pitch, const A* weights, int64_t head_dim,
                            const A* panels, int64_t count, A* scores, const Exponential& made_of) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  const int64_t size = pitch * kLanes;
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2, q += 2 * pitch, scores += 2 * kAdditivePitch) {
    int64_t panel = 0;
    for (; panel + 2 <= count; panel += 2) {
      additive_tile<2, 2>(head_dim, q, pitch, weights, panels + panel * size, scores + panel * kLanes, made_of);
    }
    if (panel < count) {
      additive_tile<2, 1>(head_dim, q, pitch, weights, panels + panel * size, scores + panel * kLanes, made_of);
    }
  }
  for (int64_t panel = 0; row < rows && panel < count; ++panel) {
    additive_tile<1, 1>(head_dim, q, pitch, weights, panels + panel * size, scores + panel * kLanes, made_of);
  }
}

}  // namespace detail

// The scores of queries and `count` panels of keys, which hold exp(2 k).
template <typename A>
__attribute__((noinline)) void product_scores(const QueryRows<A>& queries, const A* weights, int64_t head_dim,
                                              const A* panels, int64_t count, A* scores) {
  detail::additive_scores(queries.powers, queries.rows, queries.pitch, weights, head_dim, panels, count, scores,
                          [](Vec<A> q, Vec<A> k) { return q * k; });
}

// The same where the panels hold k.
template <typename A>
__attribute__((noinline)) void direct_scores(const QueryRows<A>& queries, const A* weights, int64_t head_dim,
                                             const A* panels, int64_t count, A* scores) {
  detail::additive_scores(queries.plain, queries.rows, queries.pitch, weights, head_dim, panels, count, scores,
                          [](Vec<A> q, Vec<A> k) { return direct_exponential(q, k); });
}

}  // namespace leedl
