// Residual + LayerNorm (or RMSNorm), forward: summed = dropout(x) + residual, normed = (summed - mean) * rstd * weight +
// bias.
//
// A row is read once, kept in registers through mean and variance, and written once; a row too long for that is found
// again in its sum, as it was stored. X is the dtype of x and normed, R that of residual and summed; the statistics are
// those of the sum as it is stored, in float. A row's numbers depend on the row alone.
#include "add_layer_norm.h"

#include "entry_points.h"

namespace leedl {
namespace {

using namespace add_layer_norm;

constexpr int kMostThreads = 768;  // each of them has 80 registers

template <typename X, typename R>
struct Forward {
  X* normed;
  R* summed;
  const X* x;
  const R* residual;
  Parameter<X> weight, bias;
  Dropout dropout;
  int64_t x_stride, residual_stride;
  float eps;
  bool rms;
  Layout layout;

  // Makes and stores the sum of a vector.
  __device__ void add(const Owner<X>& owner, int64_t row, int64_t column, bool is_there, Values<X>& x_values,
                      const Values<X>& residual_values) const {
    dropout.apply(row, column, x_values);
#pragma unroll
    for (int i = 0; i < kPerVector<X>; ++i) x_values[i] = rounded_to<R>(x_values[i] + residual_values[i]);
    owner.store(x_values, column, is_there, summed + row * layout.n);
  }
  // Stores a vector of the normalised row.
  __device__ void scale_and_shift(const Owner<X>& owner, int64_t row, int64_t column, bool is_there,
                                  Values<X>& x_hat) const {
    Values<X> w, b;
    weight.load(owner, column, 1.0f, w);
    bias.load(owner, column, 0.0f, b);
#pragma unroll
    for (int i = 0; i < kPerVector<X>; ++i) x_hat[i] = fmaf(x_hat[i], w[i], b[i]);
    owner.store(x_hat, column, is_there, normed + row * layout.n);
  }
};

// A block has layout.rows_per_block rows.
template <typename X, typename R, int kVectors>
__global__ void __launch_bounds__(most_threads<X>(kVectors, kMostThreads), 1)
    forward_kernel(const __grid_constant__ Forward<X, R> forward) {
  Owner<X> owner(forward.layout);
  const int64_t n = forward.layout.n;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * forward.layout.rows_per_block + owner.row_in_block;
  const bool is_there = row < forward.layout.rows;

  Values<X> values[kVectors], residuals[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    owner.load(forward.x + row * forward.x_stride, owner.column(v), is_there, values[v]);
    owner.load(forward.residual + row * forward.residual_stride, owner.column(v), is_there, residuals[v]);
  }
  float mean[1] = {0};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    forward.add(owner, row, owner.column(v), is_there, values[v], residuals[v]);
#pragma unroll
    for (int i = 0; i < kPerVector<X>; ++i) mean[0] += values[v][i];
  }
  if (!forward.rms) {
    owner.sum(mean);
    mean[0] /= static_cast<float>(n);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kPerVector<X>; ++i) {
        values[v][i] = owner.column(v) + i < n ? values[v][i] - mean[0] : 0.0f;
      }
    }
  }
  float variance[1] = {0};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kPerVector<X>; ++i) variance[0] = fmaf(values[v][i], values[v][i], variance[0]);
  }
  owner.sum(variance);
  const float rstd = reciprocal_root(variance[0] / static_cast<float>(n) + forward.eps);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kPerVector<X>; ++i) values[v][i] *= rstd;
    forward.scale_and_shift(owner, row, owner.column(v), is_there, values[v]);
  }
}

// A block has one row, which it walks through three times.
template <typename X, typename R>
__global__ void __launch_bounds__(kMostThreads, 1)
    long_forward_kernel(const __grid_constant__ Forward<X, R> forward) {
  Owner<X> owner(forward.layout);
  const int64_t n = forward.layout.n, row = blockIdx.x;
  const int step = owner.threads * kPerVector<X>;
  const R* const summed = forward.summed + row * n;
  Values<X> values;
  float mean[1] = {0}, variance[1] = {0};
  for (int64_t column = owner.first; column < n; column += step) {
    Values<X> residuals;
    owner.load(forward.x + row * forward.x_stride, column, true, values);
    owner.load(forward.residual + row * forward.residual_stride, column, true, residuals);
    forward.add(owner, row, column, true, values, residuals);
    if (!forward.rms) {
#pragma unroll
      for (int i = 0; i < kPerVector<X>; ++i) mean[0] += column + i < n ? values[i] : 0.0f;
    }
  }
  owner.sum(mean);
  mean[0] /= static_cast<float>(n);
  for (int64_t column = owner.first; column < n; column += step) {
    owner.load(summed, column, true, values);
#pragma unroll
    for (int i = 0; i < kPerVector<X>; ++i) {
      const float centered = column + i < n ? values[i] - mean[0] : 0.0f;
      variance[0] = fmaf(centered, centered, variance[0]);
    }
  }
  owner.sum(variance);
  const float rstd = reciprocal_root(variance[0] / static_cast<float>(n) + forward.eps);
  for (int64_t column = owner.first; column < n; column += step) {
    owner.load(summed, column, true, values);
#pragma unroll
    for (int i = 0; i < kPerVector<X>; ++i) values[i] = (values[i] - mean[0]) * rstd;
    forward.scale_and_shift(owner, row, column, true, values);
  }
}

// dx = dresidual times what the forward pass multiplied x by.
template <typename X, typename R>
__global__ void __launch_bounds__(kMostThreads, 1)
    dropout_backward_kernel(X* dx, const R* dresidual, const __grid_constant__ Dropout dropout,
                            const __grid_constant__ Layout layout) {
  Owner<X> owner(layout);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * layout.rows_per_block + owner.row_in_block;
  if (row >= layout.rows) return;
  for (int64_t column = owner.first; column < layout.n; column += owner.threads * kPerVector<X>) {
    Values<X> values;
    owner.load(dresidual + row * layout.n, column, true, values);
    dropout.apply(row, column, values);
    owner.store(values, column, true, dx + row * layout.n);
  }
}

unsigned grid_of(const Layout& layout) {
  return grid_size(ceil_div<int64_t>(layout.rows, layout.rows_per_block));
}

}  // namespace

namespace entry_points {

bool add_layer_norm_forward(const Tensor& normed, const Tensor& summed, const Tensor& x, const Tensor& residual,
                            const Tensor& weight, const Tensor& bias, const Tensor& seed, double eps, bool rms,
                            double dropout_p) {
  const int64_t n = normed.size(-1), rows = normed.numel() / n;
  const int64_t x_stride = x.row_stride(), residual_stride = residual.row_stride();
  if (x_stride < 0 || residual_stride < 0 || !weight.is_contiguous() || !bias.is_contiguous()) return false;
  if (rows == 0) return true;
  const Stream stream(normed);
  dispatch_pair(x.dtype(), residual.dtype(), [&](auto x_tag, auto residual_tag) {
    using X = typename decltype(x_tag)::Type;
    using R = typename decltype(residual_tag)::Type;
    const std::uintptr_t addresses = normed.address() | summed.address() | x.address() | residual.address() |
                                     weight.address() | bias.address();
    const bool aligned = are_aligned(n | x_stride | residual_stride, addresses, kPerVector<X>);
    const Layout layout = layout_of<X>(rows, n, kMostThreads, aligned);
    const Forward<X, R> forward = {normed.data<X>(), summed.data<R>(), x.data<const X>(), residual.data<const R>(),
                                   Parameter<X>(weight), Parameter<X>(bias), Dropout(seed, dropout_p),
                                   x_stride, residual_stride, static_cast<float>(eps), rms, layout};
    const size_t bytes = layout.shared_bytes();
    if (is_long<X>(layout)) {
      stream.launch(long_forward_kernel<X, R>, grid_of(layout), layout.block(), bytes, forward);
    } else {
      dispatch_vectors<X>(layout.vectors, [&](auto vectors) {
        stream.launch(forward_kernel<X, R, vectors.value>, grid_of(layout), layout.block(), bytes, forward);
      });
    }
  });
  return true;
}

void add_layer_norm_dropout_backward(const Tensor& dx, const Tensor& dresidual, const Tensor& seed, double dropout_p) {
  const int64_t n = dx.size(-1), rows = dx.numel() / n;
  if (rows == 0) return;
  const Stream stream(dx);
  dispatch_pair(dx.dtype(), dresidual.dtype(), [&](auto x_tag, auto residual_tag) {
    using X = typename decltype(x_tag)::Type;
    using R = typename decltype(residual_tag)::Type;
    const bool aligned = are_aligned(n, dx.address() | dresidual.address(), kPerVector<X>);
    const Layout layout = layout_of<X>(rows, n, kMostThreads, aligned);
    stream.launch(dropout_backward_kernel<X, R>, grid_of(layout), layout.block(), 0, dx.data<X>(),
                  dresidual.data<const R>(), Dropout(seed, dropout_p), layout);
  });
}

}  // namespace entry_points
}  // namespace leedl
