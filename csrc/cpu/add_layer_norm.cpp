// Residual + LayerNorm (or RMSNorm): summed = x + residual, normed = (summed - mean) * rstd * weight + bias.
//
// A row's inputs are read from memory once: its later passes find them in the caches. Several rows advance together, because
// one row alone waits for the latencies of its own sums; each row's numbers are the same however the rows are grouped.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings.h"
#include "simd.h"

namespace leedl {
namespace {

constexpr int64_t kSerialElements = 65536;     // smaller problems are done before a second thread has woken up
constexpr int64_t kStreamedBytes = 32 << 20;   // larger outputs pass by the caches
constexpr int kRowsTogether = 4;

// Where a row's loops stand: a whole vector at element j, or the last n - j < kSize elements.
template <typename T>
struct Whole {
  int64_t j;
  Vec<T> load(const T* row) const { return Vec<T>::load(row + j); }
  void store(Vec<T> v, T* row) const { v.store(row + j); }
  void stream(Vec<T> v, T* row) const { v.stream(row + j); }
  Vec<T> keep(Vec<T> v) const { return v; }
};

template <typename T>
struct Rest {
  int64_t j, count;
  Vec<T> load(const T* row) const { return Vec<T>::load_first(row + j, count); }
  void store(Vec<T> v, T* row) const { v.store_first(row + j, count); }
  void stream(Vec<T> v, T* row) const { store(v, row); }
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

// kSums sums over 0 .. n - 1 at once: add(at, sums) adds one vector to each. Vectors are summed in runs of a fixed length, and
// then the runs, so that rounding errors stay small in long rows.
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
  bool rms, streamed;

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
    for_each_vector<T>(0, n, [&](auto at) {
      for (int i = 0; i < kRows; ++i) {
        const V sum = at.load(x_row[i]) + at.load(residual_row[i]);
        V out = mul_add(sum - V::broadcast(means[i]), V::broadcast(rstds[i]), V::broadcast(offsets[i]));
        if (weight != nullptr && bias != nullptr) {
          out = mul_add(out, at.load(weight), at.load(bias));
        } else if (weight != nullptr) {
          out = out * at.load(weight);
        } else if (bias != nullptr) {
          out = out + at.load(bias);
        }
        T* summed_row = summed + (first_row + i) * n;
        T* normed_row = normed + (first_row + i) * n;
        if (streamed) {
          at.stream(sum, summed_row);
          at.stream(out, normed_row);
        } else {
          at.store(sum, summed_row);
          at.store(out, normed_row);
        }
      }
    });
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
  bool rms, streamed;

  // Adds the rows' terms to dweight and dbias where they are not null.
  template <int kRows>
  void run(int64_t first_row, T* dweight, T* dbias) const {
    using V = Vec<T>;
    T means[kRows], rstds[kRows];
    for (int i = 0; i < kRows; ++i) {
      means[i] = rms ? 0 : mean[first_row + i];
      rstds[i] = rstd[first_row + i];
    }
    const T* dy_rows = dnormed + first_row * n;
    const T* summed_rows = summed + first_row * n;
    T totals[2 * kRows];  // of weight * dnormed, and of the same times the normalised row
    row_sums<T, 2 * kRows>(n, totals, [&](auto at, V* sums) {
      V dw = dweight != nullptr ? at.load(dweight) : V::zero();
      V db = dbias != nullptr ? at.load(dbias) : V::zero();
      for (int i = 0; i < kRows; ++i) {
        const V dy = at.load(dy_rows + i * n);
        const V normalized = (at.load(summed_rows + i * n) - V::broadcast(means[i])) * V::broadcast(rstds[i]);
        const V dnormalized = weight != nullptr ? dy * at.load(weight) : dy;
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
    for_each_vector<T>(0, n, [&](auto at) {
      for (int i = 0; i < kRows; ++i) {
        const V dy = at.load(dy_rows + i * n);
        const V normalized = (at.load(summed_rows + i * n) - V::broadcast(means[i])) * V::broadcast(rstds[i]);
        const V dnormalized = weight != nullptr ? dy * at.load(weight) : dy;
        V out = (dnormalized - V::broadcast(totals[2 * i])) - normalized * V::broadcast(totals[2 * i + 1]);
        out = out * V::broadcast(rstds[i]);
        const int64_t row = (first_row + i) * n;
        if (dsummed != nullptr) out = out + at.load(dsummed + row);
        if (streamed) {
          at.stream(out, dx + row);
        } else {
          at.store(out, dx + row);
        }
      }
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

template <typename T>
bool is_streamed(int64_t rows, int64_t n, std::initializer_list<const T*> outputs) {
  const int64_t row_bytes = n * static_cast<int64_t>(sizeof(T));
  if (rows * row_bytes < kStreamedBytes || row_bytes % kVectorBytes != 0) return false;
  return std::all_of(outputs.begin(), outputs.end(), [](const T* output) {
    return reinterpret_cast<std::uintptr_t>(output) % kVectorBytes == 0;
  });
}

// Rows of one task. The blocks are also the partition by which dweight and dbias are summed: at least 16 rows, so that the
// partial sums are few against the data, at most 128, so that their rounding errors stay small.
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
                              pointer<const T>(bias), n, x_row_stride, residual_row_stride, static_cast<T>(eps), rms,
                              is_streamed<T>(rows, n, {pointer<const T>(normed), pointer<const T>(summed)})};
  const int64_t block_rows = rows_per_block(rows), blocks = (rows + block_rows - 1) / block_rows;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows * n >= kSerialElements)
  for (int64_t block = 0; block < blocks; ++block) {
    for_each_row_group(block * block_rows, std::min(rows, (block + 1) * block_rows), [&](auto together, int64_t row) {
      forward.template run<decltype(together)::value>(row);
    });
    if (forward.streamed) stream_fence();
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
                                pointer<const T>(weight), n, rms, is_streamed<T>(rows, n, {pointer<const T>(dx)})};
  const int64_t block_rows = rows_per_block(rows), blocks = (rows + block_rows - 1) / block_rows;
  const int64_t dweight_size = dweight != 0 ? n : 0, dbias_size = dbias != 0 ? n : 0;
  const int64_t block_stride = dweight_size + dbias_size;
  std::vector<T> partial(blocks * block_stride, 0);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows * n >= kSerialElements)
  for (int64_t block = 0; block < blocks; ++block) {
    T* block_dweight = dweight != 0 ? partial.data() + block * block_stride : nullptr;
    T* block_dbias = dbias != 0 ? partial.data() + block * block_stride + dweight_size : nullptr;
    for_each_row_group(block * block_rows, std::min(rows, (block + 1) * block_rows), [&](auto together, int64_t row) {
      backward.template run<decltype(together)::value>(row, block_dweight, block_dbias);
    });
    if (backward.streamed) stream_fence();
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
