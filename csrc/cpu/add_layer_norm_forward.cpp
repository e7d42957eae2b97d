// Residual + LayerNorm, forward.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "add_layer_norm.h"
#include "entry_points.h"
#include "huge_pages.h"
#include "memory.h"

namespace leedl {
namespace {

constexpr int64_t kStreamedBytes = 32 << 20;  // of an output: as large as all caches together

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

// Whether outputs are so large that nobody finds them in a cache, and all their vectors aligned.
bool streams(const Tensor& normed, const Tensor& summed, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kStreamedBytes &&
         (normed.address() | summed.address() | static_cast<std::uintptr_t>(row_bytes)) % 64 == 0;
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

}  // namespace entry_points
}  // namespace leedl
