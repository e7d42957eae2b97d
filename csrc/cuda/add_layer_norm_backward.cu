// Residual + LayerNorm (or RMSNorm), backward: with g = dnormed * weight,
//   dresidual = dsummed + rstd * (g - mean(g) - x_hat * mean(g * x_hat))
//   dweight = sum over rows of dnormed * x_hat, dbias = sum over rows of dnormed
//
// A block has consecutive rows; it reads each once and keeps it in registers, and makes its mean and variance again. What
// the rows add to dweight and dbias is summed in registers, then over the block, then over the blocks, in an order that
// the sizes alone decide. X is the dtype of dnormed, R that of summed.
#include "add_layer_norm.h"

#include "entry_points.h"

namespace leedl {
namespace {

using namespace add_layer_norm;

constexpr int kMostThreads = 512;  // each of them has 128 registers

template <typename X, typename R>
struct Backward {
  R* dresidual;
  float* partial;  // (parts, 2, n): of dweight and dbias; or null
  const X* dnormed;
  const R* dsummed;  // or null
  const R* summed;
  Parameter<X> weight;
  int64_t rows_per_part;
  float eps;
  bool rms;
  Layout layout;

  __device__ void store_dresidual(const Owner<X>& owner, int64_t row, int64_t column, bool is_there, const Values<X>& g,
                                  const Values<X>& x_hat, float rstd, float mean_g, float mean_gx) const {
    Values<X> out = {};
    if (dsummed != nullptr) owner.load(dsummed + row * layout.n, column, is_there, out);
#pragma unroll
    for (int i = 0; i < kPerVector<X>; ++i) out[i] = fmaf(fmaf(-x_hat[i], mean_gx, g[i] - mean_g), rstd, out[i]);
    owner.store(out, column, is_there, dresidual + row * layout.n);
  }
};

// A block has rows_per_part rows, layout.rows_per_block at a time.
template <typename X, typename R, int kVectors>
__global__ void __launch_bounds__(most_threads<X>(kVectors, kMostThreads), 1)
    backward_kernel(const __grid_constant__ Backward<X, R> backward) {
  constexpr int kCount = kPerVector<X>;
  Owner<X> owner(backward.layout);
  const int64_t n = backward.layout.n;
  const int rows_together = backward.layout.rows_per_block;
  const int64_t begin = blockIdx.x * backward.rows_per_part;
  const int64_t end = min(begin + backward.rows_per_part, backward.layout.rows);
  const auto length = static_cast<float>(n);

  Values<X> weight[kVectors], dweight[kVectors] = {}, dbias[kVectors] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) backward.weight.load(owner, owner.column(v), 1.0f, weight[v]);

  for (int64_t first = begin; first < end; first += rows_together) {
    const int64_t row = first + owner.row_in_block;
    const bool is_there = row < end;
    Values<X> x_hat[kVectors], g[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      owner.load(backward.summed + row * n, owner.column(v), is_there, x_hat[v]);
      owner.load(backward.dnormed + row * n, owner.column(v), is_there, g[v]);
    }
    if (!backward.rms) {
      float mean[1] = {0};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) mean[0] += x_hat[v][i];
      }
      owner.sum(mean);
      mean[0] /= length;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) x_hat[v][i] = owner.column(v) + i < n ? x_hat[v][i] - mean[0] : 0.0f;
      }
    }
    float variance[1] = {0};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) variance[0] = fmaf(x_hat[v][i], x_hat[v][i], variance[0]);
    }
    owner.sum(variance);
    const float rstd = reciprocal_root(variance[0] / length + backward.eps);

    float means[2] = {0, 0};  // of g and of g * x_hat
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float dnormed = g[v][i];
        x_hat[v][i] *= rstd;
        dweight[v][i] = fmaf(dnormed, x_hat[v][i], dweight[v][i]);
        dbias[v][i] += dnormed;
        g[v][i] = dnormed * weight[v][i];
        means[0] += g[v][i];
        means[1] = fmaf(g[v][i], x_hat[v][i], means[1]);
      }
    }
    owner.sum(means);
    const float mean_g = backward.rms ? 0.0f : means[0] / length, mean_gx = means[1] / length;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      backward.store_dresidual(owner, row, owner.column(v), is_there, g[v], x_hat[v], rstd, mean_g, mean_gx);
    }
  }

  if (backward.partial == nullptr) return;
  float* const partial = backward.partial + blockIdx.x * 2 * n;
  if (rows_together == 1) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      owner.store(dweight[v], owner.column(v), true, partial);
      owner.store(dbias[v], owner.column(v), true, partial + n);
    }
    return;
  }
  float* const shared = shared_memory<float>();  // (rows_together, 2, n); a row per warp at most has used none so far
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t column = owner.column(v) + i;
      if (column >= n) continue;
      shared[owner.row_in_block * 2 * n + column] = dweight[v][i];
      shared[owner.row_in_block * 2 * n + n + column] = dbias[v][i];
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < 2 * n; column += blockDim.x) {
    float sum = 0;
    for (int row = 0; row < rows_together; ++row) sum += shared[row * 2 * n + column];
    partial[column] = sum;
  }
}

// Adds a vector to sums in memory, or begins them.
template <typename X>
__device__ void accumulate(const Owner<X>& owner, int64_t column, bool is_first, const Values<X>& terms, float* sums) {
  Values<X> total = {};
  if (!is_first) owner.load(sums, column, true, total);
#pragma unroll
  for (int i = 0; i < kPerVector<X>; ++i) total[i] += terms[i];
  owner.store(total, column, true, sums);
}

// A block has rows_per_part rows, each of which it walks through four times; its sums for dweight and dbias are in the
// partial sums from the start, where the caches hold them.
template <typename X, typename R>
__global__ void __launch_bounds__(kMostThreads, 1)
    long_backward_kernel(const __grid_constant__ Backward<X, R> backward) {
  constexpr int kCount = kPerVector<X>;
  Owner<X> owner(backward.layout);
  const int64_t n = backward.layout.n;
  const int step = owner.threads * kCount;
  const int64_t begin = blockIdx.x * backward.rows_per_part;
  const int64_t end = min(begin + backward.rows_per_part, backward.layout.rows);
  const auto length = static_cast<float>(n);
  float* const partial = backward.partial == nullptr ? nullptr : backward.partial + blockIdx.x * 2 * n;

  if (partial != nullptr && begin >= end) {
    const Values<X> zeros = {};
    for (int64_t column = owner.first; column < n; column += step) {
      owner.store(zeros, column, true, partial);
      owner.store(zeros, column, true, partial + n);
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    const R* const summed = backward.summed + row * n;
    float mean[1] = {0}, variance[1] = {0}, means[2] = {0, 0};
    Values<X> x_hat, g;
    if (!backward.rms) {
      for (int64_t column = owner.first; column < n; column += step) {
        owner.load(summed, column, true, x_hat);
#pragma unroll
        for (int i = 0; i < kCount; ++i) mean[0] += x_hat[i];
      }
      owner.sum(mean);
      mean[0] /= length;
    }
    for (int64_t column = owner.first; column < n; column += step) {
      owner.load(summed, column, true, x_hat);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float centered = column + i < n ? x_hat[i] - mean[0] : 0.0f;
        variance[0] = fmaf(centered, centered, variance[0]);
      }
    }
    owner.sum(variance);
    const float rstd = reciprocal_root(variance[0] / length + backward.eps);
    // x_hat and g of a vector, and what it adds to dweight.
    const auto load = [&](int64_t column, Values<X>& dnormed, Values<X>& product) {
      Values<X> weight;
      owner.load(summed, column, true, x_hat);
      owner.load(backward.dnormed + row * n, column, true, dnormed);
      backward.weight.load(owner, column, 1.0f, weight);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x_hat[i] = (x_hat[i] - mean[0]) * rstd;  // beyond the row's end it meets zeros alone
        g[i] = dnormed[i] * weight[i];
        product[i] = dnormed[i] * x_hat[i];
      }
    };
    Values<X> dnormed, product;
    for (int64_t column = owner.first; column < n; column += step) {
      load(column, dnormed, product);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        means[0] += g[i];
        means[1] = fmaf(g[i], x_hat[i], means[1]);
      }
      if (partial != nullptr) {
        accumulate(owner, column, row == begin, product, partial);
        accumulate(owner, column, row == begin, dnormed, partial + n);
      }
    }
    owner.sum(means);
    const float mean_g = backward.rms ? 0.0f : means[0] / length, mean_gx = means[1] / length;
    for (int64_t column = owner.first; column < n; column += step) {
      load(column, dnormed, product);
      backward.store_dresidual(owner, row, column, true, g, x_hat, rstd, mean_g, mean_gx);
    }
  }
}

constexpr int kSumColumns = 32, kSumRows = 16;

// dweight and dbias of the partial sums; a block has kSumColumns of their 2 * n columns.
template <typename W>
__global__ void __launch_bounds__(kSumColumns * kSumRows)
    sum_parts_kernel(W* dweight, W* dbias, const float* partial, int64_t parts, int64_t n) {
  float* const shared = shared_memory<float>();
  const int column_in_block = threadIdx.x % kSumColumns, own_row = threadIdx.x / kSumColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + column_in_block;
  float sum = 0;
  if (column < 2 * n) {
    for (int64_t part = own_row; part < parts; part += kSumRows) sum += partial[part * 2 * n + column];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  W* const out = column < n ? dweight : dbias;
  if (own_row != 0 || column >= 2 * n || out == nullptr) return;
  for (int row = 1; row < kSumRows; ++row) sum += shared[row * kSumColumns + column_in_block];
  out[column < n ? column : column - n] = from_float<W>(sum);
}

}  // namespace

namespace entry_points {

void add_layer_norm_backward(const Tensor& dresidual, const Tensor& dweight, const Tensor& dbias,
                             const Tensor& partial, const Tensor& dnormed, const Tensor& dsummed, const Tensor& summed,
                             const Tensor& weight, double eps, bool rms) {
  const int64_t n = summed.size(-1), rows = summed.numel() / n, parts = partial.size(0);
  const bool has_parameters = static_cast<bool>(dweight) || static_cast<bool>(dbias);
  const Stream stream(dresidual);
  dispatch_pair(dnormed.dtype(), summed.dtype(), [&](auto x_tag, auto residual_tag) {
    using X = typename decltype(x_tag)::Type;
    using R = typename decltype(residual_tag)::Type;
    const std::uintptr_t addresses = dresidual.address() | partial.address() | dnormed.address() | dsummed.address() |
                                     summed.address() | weight.address();
    const Layout layout = layout_of<X>(rows, n, kMostThreads, are_aligned(n, addresses, kPerVector<X>));
    const int64_t groups = ceil_div<int64_t>(ceil_div<int64_t>(rows, layout.rows_per_block), parts);
    const Backward<X, R> backward = {dresidual.data<R>(), has_parameters ? partial.data<float>() : nullptr,
                                     dnormed.data<const X>(), dsummed.data<const R>(), summed.data<const R>(),
                                     Parameter<X>(weight), groups * layout.rows_per_block, static_cast<float>(eps), rms,
                                     layout};
    size_t bytes = layout.shared_bytes();
    if (is_long<X>(layout)) {
      stream.launch(long_backward_kernel<X, R>, grid_size(parts), layout.block(), bytes, backward);
    } else {
      if (layout.rows_per_block > 1) bytes = std::max<size_t>(bytes, layout.rows_per_block * 2 * n * sizeof(float));
      dispatch_vectors<X>(layout.vectors, [&](auto vectors) {
        stream.launch(backward_kernel<X, R, vectors.value>, grid_size(parts), layout.block(), bytes, backward);
      });
    }
  });
  if (!has_parameters) return;
  dispatch_to_float((dweight ? dweight : dbias).dtype(), [&](auto tag) {
    using W = typename decltype(tag)::Type;
    stream.launch(sum_parts_kernel<W>, grid_size(ceil_div<int64_t>(2 * n, kSumColumns)), kSumColumns * kSumRows,
                  kSumColumns * kSumRows * sizeof(float), dweight.data<W>(), dbias.data<W>(),
                  partial.data<const float>(), parts, n);
  });
}

}  // namespace entry_points
}  // namespace leedl
