// Residual + LayerNorm (or RMSNorm): summed = dropout(x) + residual, normed = (summed - mean) * rstd * weight + bias.
//
// A row's inputs are read from memory once: its later passes find the row's sum in the caches, as it was stored. Several
// rows are summed together, because one row alone waits for the latencies of its own sums; a row's numbers do not depend
// on that grouping. X is the dtype of x and normed, R that of residual and summed; everything is computed in
// A = Accumulate<X>, and so are the statistics, of the sum as it is stored. Nothing but that sum is kept for the
// backward, which makes the statistics again: the row is in the first-level cache, and two passes over it there cost
// less than two more tensors.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "dtypes.h"
#include "entry_points.h"
#include "huge_pages.h"
#include "memory.h"
#include "philox_simd.h"
#include "simd.h"

namespace leedl {
namespace {

constexpr int64_t kSerialElements = 65536;  // smaller problems are done before a second thread has woken up
constexpr int kRowsTogether = kVectorRegisters == 32 ? 4 : 2;  // the backward pass has two sums of each
constexpr int64_t kStreamedBytes = 32 << 20;  // of an output: as large as all caches together

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

template <typename X, typename R>
struct Forward {
  using A = Accumulate<X>;
  using V = Vec<A>;

  X* normed;
  R* summed;
  const X* x;
  const R* residual;
  const A* weight;
  const A* bias;
  int64_t n, x_row_stride, residual_row_stride;
  A eps;
  bool rms;
  const Branch<A>* dropout;  // or null
  bool streams;  // outputs go past the caches

  // factors: [kRows][n], with dropout alone; sums: [kRows][n], where outputs are streamed.
  template <int kRows>
  void run(int64_t first_row, A* factors, R* sums) const {
    const X* const x_rows = x + first_row * x_row_stride;
    const R* const residual_rows = residual + first_row * residual_row_stride;
    R* const summed_rows = streams ? sums : summed + first_row * n;
    A totals[kRows];
    const auto add = [&](const auto& branch) {
      row_sums<A, kRows>(n, totals, [=, x_stride = x_row_stride, residual_stride = residual_row_stride,
                                     stride = n](auto at, V* sums) {
        for (int i = 0; i < kRows; ++i) {
          const V sum = branch(at, i, at.load(x_rows + i * x_stride)) + at.load(residual_rows + i * residual_stride);
          at.store(sum, summed_rows + i * stride);
          sums[i] = sums[i] + sum.template rounded_to<R>();
        }
      });
    };
    if (dropout != nullptr) {
      for (int i = 0; i < kRows; ++i) dropout->fill(first_row + i, n, factors + i * n);
      add([factors, scale = V::broadcast(dropout->scale), stride = n](auto at, int i, V v) {
        return v * (at.load(factors + i * stride) * scale);
      });
    } else {
      add([](auto, int, V v) { return v; });
    }
    const Statistics<A, kRows> statistics(totals, summed_rows, n, eps, rms);
    X* const normed_rows = normed + first_row * n;
    if (streams) {
      for_each_vector<A>(0, n, [=, &statistics, w = weight, b = bias, to = summed + first_row * n, stride = n](auto at) {
        for (int i = 0; i < kRows; ++i) {
          const V sum = at.load(summed_rows + i * stride);
          at.stream(sum, to + i * stride);
          at.stream(mul_add(statistics.normalize(i, sum), at.load(w), at.load(b)), normed_rows + i * stride);
        }
      });
    } else {
      for_each_vector<A>(0, n, [=, &statistics, w = weight, b = bias, stride = n](auto at) {
        for (int i = 0; i < kRows; ++i) {
          const V normalized = statistics.normalize(i, at.load(summed_rows + i * stride));
          at.store(mul_add(normalized, at.load(w), at.load(b)), normed_rows + i * stride);
        }
      });
    }
  }
};

template <typename X, typename R>
struct Backward {
  using A = Accumulate<X>;
  using V = Vec<A>;

  R* dresidual;
  const X* dnormed;
  const R* dsummed;
  const R* summed;
  const A* weight;
  int64_t n;
  A eps;
  bool rms;

  // Adds the rows' terms to dweight and dbias.
  template <int kRows>
  void run(int64_t first_row, A* dweight, A* dbias) const {
    const X* const dy_rows = dnormed + first_row * n;
    const R* const summed_rows = summed + first_row * n;
    const A* const w = weight;
    const int64_t stride = n;
    A row_totals[kRows];
    row_sums<A, kRows>(n, row_totals, [=](auto at, V* sums) {
      for (int i = 0; i < kRows; ++i) sums[i] = sums[i] + at.load(summed_rows + i * stride);
    });
    const Statistics<A, kRows> statistics(row_totals, summed_rows, n, eps, rms);
    A totals[2 * kRows];  // of weight * dnormed, and of the same times the normalised row
    row_sums<A, 2 * kRows>(n, totals, [&](auto at, V* sums) {
      V dw = at.load(dweight), db = at.load(dbias);
      for (int i = 0; i < kRows; ++i) {
        const V dy = at.load(dy_rows + i * stride);
        const V normalized = statistics.normalize(i, at.load(summed_rows + i * stride));
        const V dnormalized = dy * at.load(w);
        sums[2 * i] = sums[2 * i] + dnormalized;
        sums[2 * i + 1] = mul_add(dnormalized, normalized, sums[2 * i + 1]);
        dw = mul_add(dy, normalized, dw);
        db = db + dy;
      }
      at.store(dw, dweight);
      at.store(db, dbias);
    });
    for (int i = 0; i < kRows; ++i) {
      totals[2 * i] = rms ? 0 : totals[2 * i] / static_cast<A>(n);
      totals[2 * i + 1] /= static_cast<A>(n);
    }
    for (int i = 0; i < kRows; ++i) {
      write_row(statistics, i, totals[2 * i], totals[2 * i + 1], (first_row + i) * n);
    }
  }

  template <int kRows>
  void write_row(const Statistics<A, kRows>& statistics, int i, A dnormalized_mean, A product_mean,
                 int64_t offset) const {
    const V scale = V::broadcast(statistics.rstd[i]);
    const V constant = V::broadcast(dnormalized_mean), slope = V::broadcast(product_mean);
    const X* const dy_row = dnormed + offset;
    const R* const summed_row = summed + offset;
    const A* const w = weight;
    const R* const dsummed_row = dsummed != nullptr ? dsummed + offset : nullptr;
    R* const dresidual_row = dresidual + offset;
    for_each_vector<A>(0, n, [=, &statistics](auto at) {
      const V dy = at.load(dy_row);
      const V normalized = statistics.normalize(i, at.load(summed_row));
      const V dnormalized = dy * at.load(w);
      const V out = mul_add(-normalized, slope, dnormalized - constant) * scale;
      at.store(dsummed_row != nullptr ? out + at.load(dsummed_row) : out, dresidual_row);
    });
  }
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
int64_t rows_per_block(int64_t rows) { return std::clamp((rows + 63) / 64, int64_t{16}, int64_t{128}); }

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

// Whether outputs are so large that nobody finds them in a cache, and all their vectors aligned.
bool streams(const Tensor& normed, const Tensor& summed, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kStreamedBytes &&
         (normed.address() | summed.address() | static_cast<std::uintptr_t>(row_bytes)) % 64 == 0;
}

// The sum of `blocks` rows of n partial sums, every second row of `partial`, in their order, in double.
template <typename A, typename T>
void reduce_blocks(const A* partial, int64_t blocks, int64_t n, T* out, int num_threads) {
  constexpr int64_t kColumns = 256;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (blocks * n >= kSerialElements)
  for (int64_t begin = 0; begin < n; begin += kColumns) {
    const int64_t count = std::min(kColumns, n - begin);
    double sums[kColumns] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const A* row = partial + block * 2 * n + begin;
      for (int64_t j = 0; j < count; ++j) sums[j] += static_cast<double>(row[j]);
    }
    A rounded[kColumns];
    for (int64_t j = 0; j < count; ++j) rounded[j] = static_cast<A>(sums[j]);
    for_each_vector<A>(0, count, [&](auto at) { at.store(at.load(rounded), out + begin); });
  }
}

template <typename A>
void reduce_blocks_to(const Tensor& out, const A* partial, int64_t blocks, int64_t n, int num_threads) {
  dispatch(out.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (std::is_same_v<Accumulate<T>, A>) reduce_blocks(partial, blocks, n, out.data<T>(), num_threads);
  });
}

}  // namespace

namespace entry_points {

bool add_layer_norm_forward(const Tensor& normed, const Tensor& summed, const Tensor& x, const Tensor& residual,
                            const Tensor& weight, const Tensor& bias, const Tensor& seed, double eps, bool rms,
                            double dropout_p, int num_threads) {
  const int64_t n = normed.size(-1), rows = normed.numel() / n;
  const int64_t x_stride = x.row_stride(), residual_stride = residual.row_stride();
  for (const Tensor* const parameter : {&weight, &bias}) {
    if (!parameter->is_contiguous()) return false;
  }
  if (x_stride < 0 || residual_stride < 0) return false;
  dispatch_pair(x.dtype(), residual.dtype(), [&](auto x_tag, auto residual_tag) {
    using X = typename decltype(x_tag)::Type;
    using R = typename decltype(residual_tag)::Type;
    using A = Accumulate<X>;
    const Parameter<A> weights(weight, n, 1), biases(bias, n, 0);
    const auto* const key = seed.data<const uint64_t>();
    const Branch<A> dropout(dropout_p, key != nullptr ? *key : 0);
    const Forward<X, R> forward = {normed.data<X>(), summed.data<R>(), x.data<const X>(), residual.data<const R>(),
                                   weights.data(), biases.data(), n, x_stride, residual_stride,
                                   static_cast<A>(eps), rms, key != nullptr ? &dropout : nullptr,
                                   streams(normed, summed, rows, n * static_cast<int64_t>(sizeof(X)))};
    advise_huge_pages(forward.normed, rows * n * static_cast<int64_t>(sizeof(X)));
    advise_huge_pages(forward.summed, rows * n * static_cast<int64_t>(sizeof(R)));
    const int64_t block_rows = rows_per_block(rows), blocks = (rows + block_rows - 1) / block_rows;
    const int64_t factors = key != nullptr ? round_up(kRowsTogether * n, 64) : 0;
    const Buffer<A> memory = key != nullptr ? allocate<A>(std::max(num_threads, 1) * factors) : nullptr;
    const int64_t sums = forward.streams ? kRowsTogether * n : 0;
    const Buffer<R> sums_memory = forward.streams ? allocate<R>(std::max(num_threads, 1) * sums) : nullptr;
    for_each_block(blocks, rows * n >= kSerialElements ? num_threads : 1, [&](int64_t block, int thread) {
      A* const own_factors = memory.get() + thread * factors;
      R* const own_sums = sums_memory.get() + thread * sums;
      for_each_row_group(block * block_rows, std::min(rows, (block + 1) * block_rows), [&](auto together, int64_t row) {
        forward.template run<decltype(together)::value>(row, own_factors, own_sums);
      });
      if (forward.streams) end_streams();
    });
  });
  return true;
}

// dx = dresidual times what the forward pass multiplied x by.
void add_layer_norm_dropout_backward(const Tensor& dx, const Tensor& dresidual, const Tensor& seed, double dropout_p,
                                     int num_threads) {
  const int64_t n = dx.size(-1), rows = dx.numel() / n;
  dispatch_pair(dx.dtype(), dresidual.dtype(), [&](auto x_tag, auto residual_tag) {
    using X = typename decltype(x_tag)::Type;
    using R = typename decltype(residual_tag)::Type;
    using A = Accumulate<X>;
    const Branch<A> dropout(dropout_p, *seed.data<const uint64_t>());
    const int64_t pitch = round_up(n, 64);
    const Buffer<A> memory = allocate<A>(std::max(num_threads, 1) * pitch);
    advise_huge_pages(dx.data<X>(), rows * n * static_cast<int64_t>(sizeof(X)));
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows * n >= kSerialElements)
    for (int64_t row = 0; row < rows; ++row) {
      A* const factors = memory.get() + omp_get_thread_num() * pitch;
      dropout.fill(row, n, factors);
      for_each_vector<A>(0, n, [=, from = dresidual.data<const R>() + row * n, to = dx.data<X>() + row * n,
                                scale = Vec<A>::broadcast(dropout.scale)](auto at) {
        at.store(at.load(from) * (at.load(factors) * scale), to);
      });
    }
  });
}

void add_layer_norm_backward(const Tensor& dresidual, const Tensor& dweight, const Tensor& dbias,
                             const Tensor& dnormed, const Tensor& dsummed, const Tensor& summed, const Tensor& weight,
                             double eps, bool rms, int num_threads) {
  const int64_t n = summed.size(-1), rows = summed.numel() / n;
  dispatch_pair(dnormed.dtype(), summed.dtype(), [&](auto x_tag, auto residual_tag) {
    using X = typename decltype(x_tag)::Type;
    using R = typename decltype(residual_tag)::Type;
    using A = Accumulate<X>;
    const Parameter<A> weights(weight, n, 1);
    const Backward<X, R> backward = {dresidual.data<R>(), dnormed.data<const X>(), dsummed.data<const R>(),
                                     summed.data<const R>(), weights.data(), n, static_cast<A>(eps), rms};
    advise_huge_pages(backward.dresidual, rows * n * static_cast<int64_t>(sizeof(R)));
    const int64_t block_rows = rows_per_block(rows), blocks = (rows + block_rows - 1) / block_rows;
    std::vector<A> partial(blocks * 2 * n, 0);  // of each block, dweight and dbias
    for_each_block(blocks, rows * n >= kSerialElements ? num_threads : 1, [&](int64_t block, int) {
      A* const own = partial.data() + block * 2 * n;
      for_each_row_group(block * block_rows, std::min(rows, (block + 1) * block_rows), [&](auto together, int64_t row) {
        backward.template run<decltype(together)::value>(row, own, own + n);
      });
    });
    int64_t offset = 0;
    for (const Tensor* const sum : {&dweight, &dbias}) {
      if (*sum) reduce_blocks_to(*sum, partial.data() + offset, blocks, n, num_threads);
      offset += n;
    }
  });
}

}  // namespace entry_points
}  // namespace leedl
