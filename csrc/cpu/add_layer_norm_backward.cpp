// Residual + LayerNorm, backward. Nothing but the sum was kept for it: it makes the statistics again, since the row is in
// the first-level cache, and two passes over it there cost less than two more tensors.
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "add_layer_norm.h"
#include "entry_points.h"
#include "huge_pages.h"
#include "memory.h"

namespace leedl {
namespace {

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
