// What the forward and the backward pass of add_layer_norm share: who owns which part of a row, the parameters, dropout.
#pragma once

#include "runtime.h"  // Python.h, which must come first

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "numbers.h"
#include "philox.h"
#include "reductions.h"

namespace leedl::add_layer_norm {

constexpr int kMostNumbers = 16;  // of a row that a thread keeps in registers
constexpr int kThreadsForShortRows = 128;
constexpr int kMostSums = 2;  // over a row at once

// Vectors of X that a thread owns at most.
template <typename X>
constexpr int kMostVectors = kMostNumbers / kPerVector<X>;

template <typename X>
using Values = float[kPerVector<X>];

// How a block's threads share rows: `threads` neighbours own a row, a power of two of them within a warp, or the block.
// Vector i of a row belongs to thread i % threads, so that neighbours read neighbouring addresses.
struct Layout {
  int64_t rows, n;
  int threads, rows_per_block, vectors;  // vectors: of each thread
  bool is_aligned;

  int block() const { return threads * rows_per_block; }
  // Of the sums over a row, two places for each warp.
  size_t shared_bytes() const { return block() / kWarpSize * 2 * sizeof(float[kMostSums]); }
};

inline int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Rows of at most most_threads * kMostNumbers numbers are owned whole; longer ones are walked through by most_threads.
template <typename X>
Layout layout_of(int64_t rows, int64_t n, int most_threads, bool is_aligned) {
  const int64_t vectors = ceil_div<int64_t>(n, kPerVector<X>);
  Layout layout = {rows, n, power_of_two_from(std::min<int64_t>(vectors, kWarpSize)), 1, 1, is_aligned};
  layout.vectors = power_of_two_from(ceil_div<int64_t>(vectors, layout.threads));
  if (layout.vectors > kMostVectors<X>) {
    layout.vectors = kMostVectors<X>;
    const int64_t threads = ceil_div<int64_t>(ceil_div<int64_t>(vectors, layout.vectors), kWarpSize) * kWarpSize;
    layout.threads = static_cast<int>(std::min<int64_t>(threads, most_threads));
  } else {
    layout.rows_per_block = kThreadsForShortRows / layout.threads;
  }
  return layout;
}

// Of the blocks whose threads own so many vectors, as layout_of makes them.
template <typename X>
constexpr int most_threads(int vectors, int most_of_long_rows) {
  return vectors == kMostVectors<X> ? most_of_long_rows : kThreadsForShortRows;
}

template <typename X>
bool is_long(const Layout& layout) {
  return layout.n > static_cast<int64_t>(layout.threads) * layout.vectors * kPerVector<X>;
}

// A thread's part of a row.
template <typename X>
struct Owner {
  int64_t n;
  int threads, row_in_block, first;
  bool is_aligned, takes_second_place = false;

  __device__ explicit Owner(const Layout& layout)
      : n(layout.n), threads(layout.threads), is_aligned(layout.is_aligned) {
    const bool shares_block = layout.rows_per_block > 1;
    row_in_block = shares_block ? threadIdx.x / threads : 0;
    first = (shares_block ? threadIdx.x % threads : threadIdx.x) * kPerVector<X>;
  }

  __device__ int64_t column(int vector) const { return first + static_cast<int64_t>(vector) * threads * kPerVector<X>; }

  // The vector at `column` of a row, of which zeros are read where it has no numbers, or is_there is false.
  template <typename T>
  __device__ void load(const T* row, int64_t column, bool is_there, Values<X>& to) const {
    leedl::load(row + column, is_there ? n - column : 0, is_aligned, to);
  }
  template <typename T>
  __device__ void store(const Values<X>& from, int64_t column, bool is_there, T* row) const {
    leedl::store(from, is_there ? n - column : 0, is_aligned, row + column);
  }

  // Sums over a row, for each of its threads; the whole block calls it.
  template <int kSums>
  __device__ void sum(float (&values)[kSums]) {
    static_assert(kSums <= kMostSums);
    if (threads <= kWarpSize) {
      sum_over_lanes(values, threads);
    } else {
      float* const place = shared_memory<float>() + (takes_second_place ? threads / kWarpSize * kMostSums : 0);
      sum_over_block(values, reinterpret_cast<float(*)[kSums]>(place));
      takes_second_place = !takes_second_place;
    }
  }
};

// A weight or a bias: of the dtype of x, or float beside it, or none.
template <typename X>
struct Parameter {
  const X* own;
  const float* wide;

  explicit Parameter(const Tensor& tensor) : own(nullptr), wide(nullptr) {
    if (!tensor) return;
    if (tensor.dtype() == DType::kFloat32) {
      wide = tensor.data<const float>();
    } else {
      own = tensor.data<const X>();
    }
  }

  __device__ void load(const Owner<X>& owner, int64_t column, float absent, Values<X>& to) const {
    if (wide != nullptr) {
      owner.load(wide, column, true, to);
    } else if (own != nullptr) {
      owner.load(own, column, true, to);
    } else {
#pragma unroll
      for (int i = 0; i < kPerVector<X>; ++i) to[i] = absent;
    }
  }
};

// Dropout of x: the words of row `row` are those of the counters (column / 4, row) of the stream.
struct Dropout {
  const int64_t* seed;  // null: none
  uint32_t threshold;
  float scale;

  Dropout(const Tensor& seed, double dropout_p)
      : seed(seed.data<const int64_t>()),
        threshold(static_cast<uint32_t>(dropout_p * 0x1p32)),
        scale(static_cast<float>(1 / (1 - dropout_p))) {}

  template <int kCount>
  __device__ void apply(int64_t row, int64_t column, float (&x)[kCount]) const {
    if (seed == nullptr) return;
    const uint64_t key = *seed;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const Philox4x32 counter = {{static_cast<uint32_t>((column + i) / 4), static_cast<uint32_t>(row),
                                   static_cast<uint32_t>(row >> 32), kAddLayerNormStream}};
      const Philox4x32 words = philox4x32_10(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i + j] = words.word[j] >= threshold ? x[i + j] * scale : 0.0f;
    }
  }
};

__device__ __forceinline__ float reciprocal_root(float x) { return 1.0f / sqrtf(x); }

// Calls body(Tag<X>(), Tag<R>()) for the dtypes of x and of residual: the same, or float beside two bytes.
template <typename Body>
void dispatch_pair(DType dtype, DType residual_dtype, const Body& body) {
  dispatch_to_float(dtype, [&](auto tag) {
    if constexpr (kIsTwoBytes<typename decltype(tag)::Type>) {
      if (residual_dtype != dtype) return body(tag, Tag<float>());
    }
    body(tag, tag);
  });
}

// Calls body(std::integral_constant<int, vectors>()) for the vectors of a layout, 1 to kMostVectors<X>.
template <typename X, typename Body>
void dispatch_vectors(int vectors, const Body& body) {
  if (vectors == 1) return body(std::integral_constant<int, 1>());
  if constexpr (kMostVectors<X> == 2) {
    body(std::integral_constant<int, 2>());
  } else {
    static_assert(kMostVectors<X> == 4);
    if (vectors == 2) return body(std::integral_constant<int, 2>());
    body(std::integral_constant<int, 4>());
  }
}

inline bool are_aligned(int64_t strides, std::uintptr_t addresses, int per_vector) {
  return strides % per_vector == 0 && addresses % 16 == 0;
}

}  // namespace leedl::add_layer_norm
