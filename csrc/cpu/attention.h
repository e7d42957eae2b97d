// Attention on the CPU: what its files share. The forward and backward passes stand in files of their own,
// attention.cpp binds them.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../common/attention_tiles.h"
#include "gemm.h"
#include "huge_pages.h"
#include "memory.h"

namespace leedl {

constexpr int64_t kMaxHeadDim = 256;
// Rows of Q and dout as the left operand. An odd number of cache lines apart, so that they spread over the cache's
// sets.
constexpr int64_t kHeadPitch = kMaxHeadDim + 16;
// Per-row values of one strip of queries are kept in whole vectors.
constexpr int64_t kStripRows = 16;
static_assert(kTileRows <= kStripRows && kStripRows % (kVectorBytes / 4) == 0);

constexpr double kLog2e = 1.44269504088896340735992468100189214;

struct AttentionSizes {
  int64_t batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v;

  int64_t group() const { return num_heads / num_heads_k; }
};

// A (batch, head, seq, dim) tensor; strides in elements, the last dimension contiguous.
template <typename T>
struct HeadTensor {
  T* data;
  int64_t batch_stride, head_stride, seq_stride;

  T* row(int64_t batch, int64_t head, int64_t seq) const {
    return data + batch * batch_stride + head * head_stride + seq * seq_stride;
  }
  // For an output with these sizes: large pages under it where it is large.
  void advise(int64_t batch, int64_t heads, int64_t seqlen, int64_t dim) const {
    if (batch * heads * seqlen * dim == 0) return;
    const T* end = row(batch - 1, heads - 1, seqlen - 1) + dim;
    advise_huge_pages(data, (end - data) * static_cast<int64_t>(sizeof(T)));
  }
};

// Scores are kept as sign * q . k, so that their maximum is also that of the scaled scores, and
// exp(softmax_scale * (q . k - maximum)) = exp2((score - maximum) * factor): the difference comes first, so that large
// scores lose no more than they must.
template <typename T>
struct ScoreScale {
  T sign;       // what queries are multiplied by: 1, -1, or 0 for a scale of 0
  T magnitude;  // |softmax_scale|
  T factor;     // |softmax_scale| * log2(e), or any positive number for a scale of 0, so that it leaves -inf alone

  explicit ScoreScale(double softmax_scale)
      : sign(static_cast<T>((softmax_scale > 0) - (softmax_scale < 0))),
        magnitude(static_cast<T>(std::abs(softmax_scale))),
        factor(static_cast<T>(softmax_scale == 0 ? 1 : std::abs(softmax_scale) * kLog2e)) {}
};

struct AttentionOptions {
  AttentionSizes sizes;
  const int64_t* key_lengths;  // (batch), or null
  double softmax_scale;
  int64_t window_left, window_right;
  int num_threads;

  AttentionWindow window(int64_t batch) const {
    int64_t key_end = sizes.seqlen_k;
    if (key_lengths != nullptr) key_end = std::clamp<int64_t>(key_lengths[batch], 0, sizes.seqlen_k);
    return {sizes.seqlen_q, key_end, sizes.seqlen_k - sizes.seqlen_q, window_left, window_right};
  }
};

template <typename T>
struct AttentionForward {
  AttentionOptions options;
  HeadTensor<T> out;
  // (batch, num_heads, seqlen_q), contiguous. The backward makes the probabilities of the maximum and the sum: they
  // keep what a rounded lse loses where the scores are large. A row that sees no key has lse = -inf, row_max = inf and
  // row_sum = 1.
  T* lse;
  T* row_max;  // of the scores, see ScoreScale
  T* row_sum;  // of exp(softmax_scale * (q . k) - maximum)
  HeadTensor<const T> q, k, v;
};

template <typename T>
struct AttentionBackward {
  AttentionOptions options;
  HeadTensor<T> dq, dk, dv;
  HeadTensor<const T> dout, q, k, v, out;
  const T* row_max;
  const T* row_sum;
  const T* dlse;  // like lse, or null
};

template <typename T>
void attention_forward(const AttentionForward<T>& args);
template <typename T>
void attention_backward(const AttentionBackward<T>& args);

// scores = A . B for one strip of kTileRows rows, the products of each summed in `runs` runs one after the other.
template <typename T>
inline void score_tile(int64_t runs, int64_t depth, const T* rows, const T* panels, int64_t count, T* scores,
                       int64_t pitch) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  const int64_t run = (depth + runs - 1) / runs;
  for (int64_t k = 0; k < depth; k += run) {
    tile_rows<kTileRows, TileLayout<kHeadPitch, 1>>(
        std::min(run, depth - k), rows + k, panels + k * kLanes, depth * kLanes, count,
        [&](int64_t row, int64_t panel, Vec<T> value) {
          T* to = scores + row * pitch + panel * kLanes;
          (k == 0 ? value : Vec<T>::load(to) + value).store(to);
        });
  }
}

// A query alone is a matrix-vector product, which plain PyTorch sums in many runs; many queries it sums in one.
constexpr int64_t score_runs(int64_t rows) { return rows == 1 ? 8 : 1; }

// Keeps columns [first, last) of a row of scores that has columns [begin, end), multiples of W; the rest becomes
// `value`.
template <typename T>
inline void mask_row(T* row, int64_t begin, int64_t end, int64_t first, int64_t last, T value) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  const Vec<T> masked = Vec<T>::broadcast(value);
  const auto mask = [&](int64_t column) {
    keep_lanes(first - column, last - column, Vec<T>::load(row + column), masked).store(row + column);
  };
  int64_t column = begin;
  for (; column < std::min(first, end); column += kLanes) mask(column);
  column = std::max(column, round_down(std::max(last, begin), kLanes));
  for (; column < end; column += kLanes) mask(column);
}

}  // namespace leedl
