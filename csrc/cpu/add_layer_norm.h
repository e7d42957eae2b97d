// Residual + LayerNorm (or RMSNorm): summed = dropout(x) + residual, normed = (summed - mean) * rstd * weight + bias.
// What the forward and the backward pass share.
//
// A row's inputs are read from memory once: its later passes find the row's sum in the caches, as it was stored. Several
// rows are summed together, because one row alone waits for the latencies of its own sums; a row's numbers do not depend
// on that grouping. X is the dtype of x and normed, R that of residual and summed; everything is computed in
// A = Accumulate<X>, and so are the statistics, of the sum as it is stored.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "dtypes.h"
#include "philox_simd.h"
#include "simd.h"
#include "tensors.h"

namespace leedl {

constexpr int64_t kSerialElements = 65536;  // smaller problems are done before a second thread has woken up
constexpr int kRowsTogether = kVectorRegisters == 32 ? 4 : 2;  // the backward pass has two sums of each

// Where a row's loops stand: a whole vector at element j, or the last n - j < kSize elements. Rows are of any dtype that
// is computed in A.
template <typename A>
struct Whole {
  int64_t j;
  template <typename T>
  Vec<A> load(const T* row) const {
    return Vec<A>::load(row + j);
  }
  template <typename T>
  void store(Vec<A> v, T* row) const {
    v.store(row + j);
  }
  template <typename T>
  void stream(Vec<A> v, T* row) const {
    v.stream(row + j);
  }
  Vec<A> keep(Vec<A> v) const { return v; }
};

template <typename A>
struct Rest {
  int64_t j, count;
  template <typename T>
  Vec<A> load(const T* row) const {
    return Vec<A>::load_first(row + j, count);
  }
  template <typename T>
  void store(Vec<A> v, T* row) const {
    v.store_first(row + j, count);
  }
  template <typename T>
  void stream(Vec<A> v, T* row) const {
    store(v, row);
  }
  Vec<A> keep(Vec<A> v) const { return keep_lanes(0, count, v, Vec<A>::zero()); }  // zeros beyond the row's end
};

template <typename A, typename Body>
inline void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t j = begin;
  for (; j + Vec<A>::kSize <= end; j += Vec<A>::kSize) body(Whole<A>{j});
  if (j < end) body(Rest<A>{j, end - j});
}

// kSums sums over 0 .. n - 1 at once: add(at, sums) adds one vector to each. Vectors are summed in runs of a fixed
// length, and then the runs, so that rounding errors stay small in long rows.
template <typename T, int kSums, typename Add>
inline void row_sums(int64_t n, T* totals, const Add& add) {
  using V = Vec<T>;
  constexpr int64_t kRun = 64 * V::kSize;
  V outer[kSums];
  for (int i = 0; i < kSums; ++i) outer[i] = V::zero();
  for (int64_t begin = 0; begin < n; begin += kRun) {
    V sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = V::zero();
    for_each_vector<T>(begin, std::min(n, begin + kRun), [&](auto at) { add(at, sums); });
    for (int i = 0; i < kSums; ++i) outer[i] = outer[i] + sums[i];
  }
  for (int i = 0; i < kSums; ++i) totals[i] = reduce_add(outer[i]);
}

// What normalises kRows rows: normalized = (summed - mean) * rstd + offset, where mean is the rounded mean, and offset
// makes up for its rounding.
template <typename A, int kRows>
struct Statistics {
  using V = Vec<A>;

  A mean[kRows], rstd[kRows], offset[kRows];

  // totals: the sums of the rows, which begin at rows + i * n; not read for RMSNorm.
  template <typename R>
  Statistics(const A* totals, const R* rows, int64_t n, A eps, bool rms) {
    for (int i = 0; i < kRows; ++i) mean[i] = rms ? 0 : totals[i] / static_cast<A>(n);
    A sums[2 * kRows];  // of what is left after subtracting the mean, and of its square
    row_sums<A, 2 * kRows>(n, sums, [=, means = mean, stride = n](auto at, V* sums) {
      for (int i = 0; i < kRows; ++i) {
        const V centered = at.load(rows + i * stride) - at.keep(V::broadcast(means[i]));
        sums[2 * i] = sums[2 * i] + centered;
        sums[2 * i + 1] = mul_add(centered, centered, sums[2 * i + 1]);
      }
    });
    for (int i = 0; i < kRows; ++i) {
      const A left = rms ? 0 : sums[2 * i] / static_cast<A>(n);
      rstd[i] = 1 / std::sqrt(sums[2 * i + 1] / static_cast<A>(n) - left * left + eps);
      offset[i] = -left * rstd[i];
    }
  }

  V normalize(int i, V summed) const {
    return mul_add(summed - V::broadcast(mean[i]), V::broadcast(rstd[i]), V::broadcast(offset[i]));
  }
};

// Dropout of the branch x: 0 or scale is what each of its elements is multiplied by.
template <typename A>
struct Branch {
  Dropout<A> mask;
  A scale;

  Branch(double dropout_p, uint64_t seed)
      : mask(dropout_p, seed, kAddLayerNormStream), scale(static_cast<A>(1 / (1 - dropout_p))) {}
  void fill(int64_t row, int64_t n, A* factors) const { mask.fill(0, n, row, row >> 32, factors); }
};

// Calls run(rows together, first row) over rows begin .. end - 1.
template <typename Run>
void for_each_row_group(int64_t begin, int64_t end, const Run& run) {
  int64_t row = begin;
  for (; row + kRowsTogether <= end; row += kRowsTogether) {
    run(std::integral_constant<int, kRowsTogether>(), row);
  }
  for (; row < end; ++row) run(std::integral_constant<int, 1>(), row);
}

// Rows of one task. The blocks are also the partition by which dweight and dbias are summed: at least 16 rows, so that
// the partial sums are few against the data, at most 128, so that their rounding errors stay small.
inline int64_t rows_per_block(int64_t rows) { return std::clamp((rows + 63) / 64, int64_t{16}, int64_t{128}); }

// Calls body(block, thread) for every block. One thread is no parallel region: entering one costs as much as a few rows.
template <typename Body>
void for_each_block(int64_t blocks, int num_threads, const Body& body) {
  if (num_threads <= 1) {
    for (int64_t block = 0; block < blocks; ++block) body(block, 0);
  } else {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
    for (int64_t block = 0; block < blocks; ++block) body(block, omp_get_thread_num());
  }
}

// A weight or a bias as n numbers of A: converted where its dtype is another, `absent` n times where there is none.
template <typename A>
class Parameter {
 public:
  Parameter(const Tensor& parameter, int64_t n, A absent) {
    if (!parameter) {
      made_.assign(n, absent);
      data_ = made_.data();
      return;
    }
    dispatch(parameter.dtype(), [&](auto tag) {
      using T = typename decltype(tag)::Type;
      if constexpr (std::is_same_v<A, T>) {
        data_ = parameter.data<const A>();
      } else if constexpr (std::is_same_v<A, Accumulate<T>>) {
        made_.resize(n);
        for_each_vector<A>(0, n, [from = parameter.data<const T>(), to = made_.data()](auto at) {
          at.store(at.load(from), to);
        });
        data_ = made_.data();
      }
    });
  }
  const A* data() const { return data_; }

 private:
  std::vector<A> made_;
  const A* data_ = nullptr;
};

// Calls body(Tag<X>(), Tag<R>()) for the dtypes of x and of residual: the same, or float beside two bytes.
template <typename Body>
void dispatch_pair(DType dtype, DType residual_dtype, const Body& body) {
  dispatch(dtype, [&](auto tag) {
    if constexpr (kIsTwoBytes<typename decltype(tag)::Type>) {
      if (residual_dtype != dtype) return body(tag, Tag<float>());
    }
    body(tag, tag);
  });
}

}  // namespace leedl
