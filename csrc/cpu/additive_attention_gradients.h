// The inner loop of the backward pass of additive attention, and the tensors that several of its tasks add to.
#pragma once

#include <type_traits>

#include "additive_attention.h"

namespace leedl {

constexpr int64_t kRowsTogether = kTileRows / 2;  // of u: their queries and sums fill half of the registers
static_assert(kTileRows % kRowsTogether == 0);
// What is summed is summed in runs of so many terms, and then the runs, so that rounding errors stay small.
constexpr int64_t kKeyRun = 16, kValueRun = 16;

// One vector of c: for kRows queries and the keys [begin, end), adds u to dq and dk, and returns the sum of dS y. q and k
// hold exp(2 .), or the numbers themselves if kDirect.
template <int64_t kRows, bool kDirect, typename A>
inline __attribute__((always_inline)) Vec<A> add_gradients(const A* __restrict__ q, const A* __restrict__ ds,
                                                           const A* __restrict__ k, A* __restrict__ dk, int64_t begin,
                                                           int64_t end, A* __restrict__ dq, int64_t pitch) {
  using V = Vec<A>;
  const V quarter = V::broadcast(static_cast<A>(0.25));
  V queries[kRows], dw = V::zero();
#pragma GCC unroll 8
  for (int64_t row = 0; row < kRows; ++row) queries[row] = V::load(q + row * pitch);
#pragma GCC unroll 1
  for (int64_t key = begin; key < end;) {
    V sums[kRows] = {}, run = V::zero();
    const int64_t run_end = std::min(key + kKeyRun, end);
#pragma GCC unroll 1
    for (; key < run_end; ++key) {
      const V keys = V::load(k + key * V::kSize);
      V dkeys = V::zero();
#pragma GCC unroll 8
      for (int64_t row = 0; row < kRows; ++row) {
        V e;
        if constexpr (kDirect) {
          e = direct_exponential(queries[row], keys);
        } else {
          e = queries[row] * keys;
        }
        const V y = half_tanh(e), gradient = V::broadcast(ds[row * kAdditivePitch + key]);
        const V u = gradient * mul_add(-y, y, quarter);
        run = mul_add(gradient, y, run);
        dkeys = dkeys + u;
        sums[row] = sums[row] + u;
      }
      (V::load(dk + key * V::kSize) + dkeys).store(dk + key * V::kSize);
    }
    dw = dw + run;
#pragma GCC unroll 8
    for (int64_t row = 0; row < kRows; ++row) (V::load(dq + row * pitch) + sums[row]).store(dq + row * pitch);
  }
  return dw;
}

// A (batch, heads, seqlen, dim) tensor in which gradients are summed: the output itself where it can hold sums.
template <typename T>
class Sums {
 public:
  using A = Accumulate<T>;

  Sums(const HeadTensor<T>& output, int64_t batch, int64_t heads, int64_t seqlen, int64_t dim)
      : output_(output), batch_(batch), heads_(heads), seqlen_(seqlen), dim_(dim) {
    if constexpr (std::is_same_v<A, T>) {
      sums_ = output;
      output.advise(batch, heads, seqlen, dim);
    } else {
      memory_ = allocate<A>(rows() * dim);
      sums_ = {memory_.get(), heads * seqlen * dim, seqlen * dim, dim};
    }
  }

  int64_t rows() const { return batch_ * heads_ * seqlen_; }
  A* row(int64_t batch, int64_t head, int64_t seq) const { return sums_.row(batch, head, seq); }

  void clear(int64_t row) const { std::fill_n(at(sums_, row), dim_, A(0)); }
  // Rounds what was summed elsewhere to the output.
  void finish(int64_t row) const {
    if constexpr (!std::is_same_v<A, T>) {
      const A* from = at(sums_, row);
      T* to = at(output_, row);
      for (int64_t c = 0; c < dim_; c += Vec<A>::kSize) {
        store_columns(Vec<A>::load_first(from + c, std::min(dim_ - c, Vec<A>::kSize)), to + c, dim_ - c);
      }
    }
  }

 private:
  template <typename N>
  N* at(const HeadTensor<N>& tensor, int64_t row) const {
    return tensor.row(row / seqlen_ / heads_, row / seqlen_ % heads_, row % seqlen_);
  }

  HeadTensor<T> output_;
  int64_t batch_, heads_, seqlen_, dim_;
  Buffer<A> memory_;
  HeadTensor<A> sums_;
};

}  // namespace leedl
