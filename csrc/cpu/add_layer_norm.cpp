// Residual + LayerNorm (or RMSNorm): summed = x + residual, normed = (summed - mean) * rstd * weight + bias.
//
// A row's inputs are read from memory once: its later passes find them in the caches. Several rows are summed together,
// because one row alone waits for the latencies of its own sums; a row's numbers do not depend on that grouping.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings.h"
#include "huge_pages.h"
#include "simd.h"

namespace leedl {
namespace {

constexpr int64_t kSerialElements = 65536;  // smaller problems are done before a second thread has woken up
constexpr int kRowsTogether = 4;

// Where a row's loops stand: a whole vector at element j, or the last n - j < kSize elements.
template <typename T>
struct Whole {
  int64_t j;
  Vec<T> load(const T* row) const { return Vec<T>::load(row + j); }
  void store(Vec<T> v, T* row) const { v.store(row + j); }
  Vec<T> keep(Vec<T> v) const { return v; }
};

template <typename T>
struct Rest {
  int64_t j, count;
  Vec<T> load(const T* row) const { return Vec<T>::load_first(row + j, count); }
  void store(Vec<T> v, T* row) const { v.store_first(row + j, count); }
  Vec<T> keep(Vec<T> v) const {  // zeros beyond the row's end
    T lanes[Vec<T>::kSize];
    v.store(lanes);
    return Vec<T>::load_first(lanes, count);
  }
};

template <typename T, typename Body>
inline void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t j = begin;
  for (; j + Vec<T>::kSize <= end; j += Vec<T>::kSize) body(Whole<T>{j});
  if (j < end) body(Rest<T>{j, end - j});
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

template <typename T>
struct Forward {
  T* normed;
  T* summed;
  T* mean;
  T* rstd;
  const T* x;
  const T* residual;
  const T* weight;
  const T* bias;
  int64_t n, x_row_stride, residual_row_stride;
  T eps;
  bool rms;

  template <int kRows>
  void run(int64_t first_row) const {
    using V = Vec<T>;
    const T* x_row[kRows];
    const T* residual_row[kRows];
    for (int i = 0; i < kRows; ++i) {
      x_row[i] = x + (first_row + i) * x_row_stride;
      residual_row[i] = residual + (first_row + i) * residual_row_stride;
    }
    T means[kRows] = {}, rstds[kRows], offsets[kRows] = {};
    if (!rms) {
      row_sums<T, kRows>(n, means, [&](auto at, V* sums) {
        for (int i = 0; i < kRows; ++i) sums[i] = sums[i] + (at.load(x_row[i]) + at.load(residual_row[i]));
      });
      for (int i = 0; i < kRows; ++i) means[i] /= static_cast<T>(n);
    }
    T totals[2 * kRows];  // of what is left after subtracting the rounded mean, and of its square
    row_sums<T, 2 * kRows>(n, totals, [&](auto at, V* sums) {
      for (int i = 0; i < kRows; ++i) {
        const V centered = (at.load(x_row[i]) + at.load(residual_row[i])) - at.keep(V::broadcast(means[i]));
        sums[2 * i] = sums[2 * i] + centered;
        sums[2 * i + 1] = mul_add(centered, centered, sums[2 * i + 1]);
      }
    });
    for (int i = 0; i < kRows; ++i) {
      const T left = rms ? 0 : totals[2 * i] / static_cast<T>(n);
      rstds[i] = 1 / std::sqrt(totals[2 * i + 1] / static_cast<T>(n) - left * left + eps);
      offsets[i] = -left * rstds[i];
      rstd[first_row + i] = rstds[i];
      if (!rms) mean[first_row + i] = means[i] + left;
    }
    for (int i = 0; i < kRows; ++i) {
      write_row(x_row[i], residual_row[i], means[i], rstds[i], offsets[i], (first_row + i) * n);
    }
  }

  void write_row(const T* x_row, const T* residual_row, T row_mean, T row_rstd, T row_offset, int64_t offset) const {
    using V = Vec<T>;
    const V mean_lanes = V::broadcast(row_mean), scale = V::broadcast(row_rstd), shift = V::broadcast(row_offset);
    T* const summed_row = summed + offset;
    T* const normed_row = normed + offset;
    const auto write = [=](const auto& affine) {
      for_each_vector<T>(0, n, [=](auto at) {
        const V sum = at.load(x_row) + at.load(residual_row);
        at.store(sum, summed_row);
        at.store(affine(at, mul_add(sum - mean_lanes, scale, shift)), normed_row);
      });
    };
    if (weight != nullptr && bias != nullptr) {
      write([w = weight, b = bias](auto at, V v) { return mul_add(v, at.load(w), at.load(b)); });
    } else if (weight != nullptr) {
      write([w = weight](auto at, V v) { return v * at.load(w); });
    } else if (bias != nullptr) {
      write([b = bias](auto at, V v) { return v + at.load(b); });
    } else {
      write([](auto, V v) { return v; });
    }
  }
};

template <typename T>
struct Backward {
  T* dx;
  const T* dnormed;
  const T* dsummed;
  const T* summed;
  const T* mean;
  const T* rstd;
  const T* weight;
  int64_t n;
  bool rms;

  // Adds the rows' terms to dweight and dbias where they are not null.
  template <int kRows>
  void run(int64_t first_row, T* dweight, T* dbias) const {
    using V = Vec<T>;
    T means[kRows], rstds[kRows];
    for (int i = 0; i < kRows; ++i) {
      means[i] = rms ? 0 : mean[first_row + i];
      rstds[i] = rstd[first_row + i];
    }
    const T *const dy_rows = dnormed + first_row * n, *const summed_rows = summed + first_row * n, *const w = weight;
    const int64_t stride = n;
    T totals[2 * kRows];  // of weight * dnormed, and of the same times the normalised row
    row_sums<T, 2 * kRows>(n, totals, [&](auto at, V* sums) {
      V dw = dweight != nullptr ? at.load(dweight) : V::zero();
      V db = dbias != nullptr ? at.load(dbias) : V::zero();
      for (int i = 0; i < kRows; ++i) {
        const V dy = at.load(dy_rows + i * stride);
        const V normalized = (at.load(summed_rows + i * stride) - V::broadcast(means[i])) * V::broadcast(rstds[i]);
        const V dnormalized = w != nullptr ? dy * at.load(w) : dy;
        sums[2 * i] = sums[2 * i] + dnormalized;
        sums[2 * i + 1] = mul_add(dnormalized, normalized, sums[2 * i + 1]);
        dw = mul_add(dy, normalized, dw);
        db = db + dy;
      }
      if (dweight != nullptr) at.store(dw, dweight);
      if (dbias != nullptr) at.store(db, dbias);
    });
    for (int i = 0; i < kRows; ++i) {
      totals[2 * i] = rms ? 0 : totals[2 * i] / static_cast<T>(n);
      totals[2 * i + 1] /= static_cast<T>(n);
    }
    for (int i = 0; i < kRows; ++i) {
      write_row(means[i], rstds[i], totals[2 * i], totals[2 * i + 1], (first_row + i) * n);
    }
  }

  void write_row(T row_mean, T row_rstd, T dnormalized_mean, T product_mean, int64_t offset) const {
    using V = Vec<T>;
    const V mean_lanes = V::broadcast(row_mean), scale = V::broadcast(row_rstd);
    const V constant = V::broadcast(dnormalized_mean), slope = V::broadcast(product_mean);
    const T *const dy_row = dnormed + offset, *const summed_row = summed + offset, *const w = weight;
    const T* const dsummed_row = dsummed != nullptr ? dsummed + offset : nullptr;
    T* const dx_row = dx + offset;
    for_each_vector<T>(0, n, [=](auto at) {
      const V dy = at.load(dy_row);
      const V normalized = (at.load(summed_row) - mean_lanes) * scale;
      const V dnormalized = w != nullptr ? dy * at.load(w) : dy;
      const V out = ((dnormalized - constant) - normalized * slope) * scale;
      at.store(dsummed_row != nullptr ? out + at.load(dsummed_row) : out, dx_row);
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

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void add_layer_norm_forward(std::uintptr_t normed, std::uintptr_t summed, std::uintptr_t mean, std::uintptr_t rstd,
                            std::uintptr_t x, std::uintptr_t residual, std::uintptr_t weight, std::uintptr_t bias,
                            int64_t rows, int64_t n, int64_t x_row_stride, int64_t residual_row_stride, double eps,
                            bool rms, int num_threads) {
  const Forward<T> forward = {pointer<T>(normed), pointer<T>(summed), pointer<T>(mean), pointer<T>(rstd),
                              pointer<const T>(x), pointer<const T>(residual), pointer<const T>(weight),
                              pointer<const T>(bias), n, x_row_stride, residual_row_stride, static_cast<T>(eps), rms};
  advise_huge_pages(forward.normed, rows * n * static_cast<int64_t>(sizeof(T)));
  advise_huge_pages(forward.summed, rows * n * static_cast<int64_t>(sizeof(T)));
  const int64_t block_rows = rows_per_block(rows), blocks = (rows + block_rows - 1) / block_rows;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (rows * n >= kSerialElements)
  for (int64_t block = 0; block < blocks; ++block) {
    for_each_row_group(block * block_rows, std::min(rows, (block + 1) * block_rows), [&](auto together, int64_t row) {
      forward.template run<decltype(together)::value>(row);
    });
  }
}

// The sum of `blocks` rows of partial sums, in their order, in double.
template <typename T>
void reduce_blocks(const T* partial, int64_t blocks, int64_t block_stride, int64_t n, T* out, int num_threads) {
  constexpr int64_t kColumns = 256;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (blocks * n >= kSerialElements)
  for (int64_t begin = 0; begin < n; begin += kColumns) {
    const int64_t count = std::min(kColumns, n - begin);
    double sums[kColumns] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const T* row = partial + block * block_stride + begin;
      for (int64_t j = 0; j < count; ++j) sums[j] += static_cast<double>(row[j]);
    }
    for (int64_t j = 0; j < count; ++j) out[begin + j] = static_cast<T>(sums[j]);
  }
}

template <typename T>
void add_layer_norm_backward(std::uintptr_t dx, std::uintptr_t dweight, std::uintptr_t dbias, std::uintptr_t dnormed,
                             std::uintptr_t dsummed, std::uintptr_t summed, std::uintptr_t mean, std::uintptr_t rstd,
                             std::uintptr_t weight, int64_t rows, int64_t n, bool rms, int num_threads) {
  const Backward<T> backward = {pointer<T>(dx), pointer<const T>(dnormed), pointer<const T>(dsummed),
                                pointer<const T>(summed), pointer<const T>(mean), pointer<const T>(rstd),
                                pointer<const T>(weight), n, rms};
  advise_huge_pages(backward.dx, rows * n * static_cast<int64_t>(sizeof(T)));
  const int64_t block_rows = rows_per_block(rows), blocks = (rows + block_rows - 1) / block_rows;
  const int64_t dweight_size = dweight != 0 ? n : 0, dbias_size = dbias != 0 ? n : 0;
  const int64_t block_stride = dweight_size + dbias_size;
  std::vector<T> partial(blocks * block_stride, 0);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (rows * n >= kSerialElements)
  for (int64_t block = 0; block < blocks; ++block) {
    T* block_dweight = dweight != 0 ? partial.data() + block * block_stride : nullptr;
    T* block_dbias = dbias != 0 ? partial.data() + block * block_stride + dweight_size : nullptr;
    for_each_row_group(block * block_rows, std::min(rows, (block + 1) * block_rows), [&](auto together, int64_t row) {
      backward.template run<decltype(together)::value>(row, block_dweight, block_dbias);
    });
  }
  if (dweight != 0) reduce_blocks(partial.data(), blocks, block_stride, n, pointer<T>(dweight), num_threads);
  if (dbias != 0) reduce_blocks(partial.data() + dweight_size, blocks, block_stride, n, pointer<T>(dbias), num_threads);
}

template <typename T>
void bind(pybind11::module_& m, const std::string& dtype) {
  using Release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def(("add_layer_norm_forward_" + dtype).c_str(), &add_layer_norm_forward<T>, Release());
  m.def(("add_layer_norm_backward_" + dtype).c_str(), &add_layer_norm_backward<T>, Release());
}

}  // namespace

void bind_add_layer_norm(pybind11::module_& m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
}

}  // namespace leedl
