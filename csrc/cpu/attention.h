// Attention on the CPU: what its files share. The forward and backward passes stand in files of their own,
// attention.cpp binds them.
#pragma once

#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

#include "../common/attention_tiles.h"
#include "exponentials.h"
#include "huge_pages.h"
#include "memory.h"
#include "packing.h"

namespace leedl {

constexpr int64_t kMaxHeadDim = 256;
// Rows of Q and dout as the left operand. An odd number of cache lines apart, so that they spread over the cache's
// sets.
constexpr int64_t kHeadPitch = kMaxHeadDim + 16;
// Queries go in strips, which make two tiles beside each other: strips begin at multiples of a vector's lanes, so that
// the keys that a strip sees through a window begin and end with a vector where the window's sides are such multiples.
constexpr int64_t kHalfRows = kVectorRegisters == 32 ? 8 : 4;
constexpr int64_t kStripRows = 2 * kHalfRows;
static_assert(kStripRows % (kVectorBytes / 4) == 0);

enum class Normalizer : int { kSoftmax, kRelu, kSigmoid };  // backends/cpu.py has the same numbers

struct AttentionSizes {
  int64_t batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v;

  int64_t group() const { return num_heads / num_heads_k; }
  int64_t rows() const { return batch * num_heads * seqlen_q; }
};

// One problem: a sample of the batch, or a sequence of the pack. Its queries and keys count from 0.
struct Sample {
  int64_t index;  // what dropout and ALiBi slopes know it by
  int64_t batch, first_query, first_key;  // where it lies in the tensors
  int64_t seqlen_k;
  AttentionWindow window;
};

// A (batch, head, seq, dim) tensor; strides in elements, the last dimension contiguous.
template <typename T>
struct HeadTensor {
  T* data;
  int64_t batch_stride, head_stride, seq_stride;

  T* row(int64_t batch, int64_t head, int64_t seq) const {
    return data + batch * batch_stride + head * head_stride + seq * seq_stride;
  }
  T* query(const Sample& sample, int64_t head, int64_t i) const {
    return row(sample.batch, head, sample.first_query + i);
  }
  T* key(const Sample& sample, int64_t head, int64_t j) const { return row(sample.batch, head, sample.first_key + j); }
  // For an output with these sizes: large pages under it where it is large.
  void advise(int64_t batch, int64_t heads, int64_t seqlen, int64_t dim) const {
    if (batch * heads * seqlen * dim == 0) return;
    const T* end = row(batch - 1, heads - 1, seqlen - 1) + dim;
    advise_huge_pages(data, (end - data) * static_cast<int64_t>(sizeof(T)));
  }
};

struct AttentionOptions {
  AttentionSizes sizes;
  const int64_t* key_lengths;                  // (batch), or null
  const int64_t *cu_seqlens_q, *cu_seqlens_k;  // (num_sequences + 1), or null
  int64_t num_sequences;
  double softmax_scale;
  int64_t window_left, window_right;
  Normalizer normalizer;
  double softcap;    // 0: none
  double dropout_p;  // 0: none
  const int64_t* seed;
  int num_threads;

  bool packed() const { return cu_seqlens_q != nullptr; }
  int64_t samples() const { return packed() ? num_sequences : sizes.batch; }
  Sample sample(int64_t index) const {
    if (packed()) {
      const int64_t seqlen_q = cu_seqlens_q[index + 1] - cu_seqlens_q[index];
      const int64_t seqlen_k = cu_seqlens_k[index + 1] - cu_seqlens_k[index];
      return {index,    0, cu_seqlens_q[index], cu_seqlens_k[index],
              seqlen_k, {seqlen_q, seqlen_k, seqlen_k - seqlen_q, window_left, window_right}};
    }
    const int64_t seqlen_k = sizes.seqlen_k;
    const int64_t key_end = key_lengths ? std::clamp<int64_t>(key_lengths[index], 0, seqlen_k) : seqlen_k;
    return {index,    index, 0, 0,
            seqlen_k, {sizes.seqlen_q, key_end, seqlen_k - sizes.seqlen_q, window_left, window_right}};
  }
  // Where the statistics of a sample's query stand in (batch, num_heads, seqlen_q).
  int64_t statistics_index(const Sample& sample, int64_t head, int64_t row) const {
    return (sample.batch * sizes.num_heads + head) * sizes.seqlen_q + sample.first_query + row;
  }
};

// A (batch, num_heads, seqlen_q, seqlen_k) tensor, broadcast where a stride is 0; null data when there is none.
template <typename T>
struct BiasTensor {
  T* data;
  int64_t batch_stride, head_stride, query_stride;

  T* row(int64_t batch, int64_t head, int64_t query) const {
    return data + batch * batch_stride + head * head_stride + query * query_stride;
  }
};

// What is added to the scores.
template <typename T>
struct ScoreTerms {
  BiasTensor<const T> bias;
  const Accumulate<T>* sinks;         // (num_heads), or null
  const Accumulate<T>* alibi_slopes;  // (num_heads) or (samples, num_heads), or null
  int64_t alibi_sample_stride;
};

template <typename T>
struct AttentionForward {
  AttentionOptions options;
  ScoreTerms<T> terms;
  HeadTensor<T> out;
  // (batch, num_heads, seqlen_q), contiguous; all null unless wanted and the normalizer is softmax. The backward makes the
  // probabilities of the maximum and the sum: they keep what a rounded lse loses where the scores are large. A row that
  // sees no key and no sink has lse = -inf, row_max = inf and row_sum = 1.
  Accumulate<T>* lse;
  Accumulate<T>* row_max;  // of the scores, see ScoreScale
  Accumulate<T>* row_sum;  // of exp(softmax_scale * (q . k) - maximum)
  HeadTensor<const T> q, k, v;
};

template <typename T>
struct AttentionBackward {
  AttentionOptions options;
  ScoreTerms<T> terms;
  HeadTensor<T> dq, dk, dv;
  BiasTensor<Accumulate<T>> dbias;  // contiguous but for its zero strides
  int64_t dbias_size;
  Accumulate<T>* dsinks;  // (num_heads), or null
  HeadTensor<const T> dout, q, k, v, out;
  const Accumulate<T>* row_max;
  const Accumulate<T>* row_sum;
  const Accumulate<T>* dlse;  // like lse, or null
};

template <typename T>
void attention_forward(const AttentionForward<T>& args);
template <typename T>
void attention_backward(const AttentionBackward<T>& args);

// Few queries (attention_decode.cpp); attention_forward calls it where attention_decodes says so.
bool attention_decodes(const AttentionOptions& options);
template <typename T>
void attention_decode(const AttentionForward<T>& args);

// What the elements of packed operands are, for tensors of T: body(Tag<E>()).
template <typename T, typename Body>
void dispatch_operand(const Body& body) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (can_multiply_pairs()) return body(Tag<BFloat16Pair>());
  }
#endif
  body(Tag<Accumulate<T>>());
}

// Samples that are cut into tasks alike: all of a batch, or one sequence of a pack, so that no sample's results depend
// on its neighbours.
template <typename Plan>
struct Segment {
  Plan plan;
  int64_t first_sample, samples;
  int64_t first_task, first_block;  // among those of all segments
};

template <typename Plan>
class Segments {
 public:
  // make(sizes) -> Plan of the problems with these sizes; tasks(plan) and blocks(plan) are those of one sample.
  template <typename Make>
  Segments(const AttentionOptions& options, const Make& make) {
    if (!options.packed()) {
      add(make(options.sizes), 0, options.sizes.batch);
      return;
    }
    AttentionSizes sizes = options.sizes;
    for (int64_t index = 0; index < options.num_sequences; ++index) {
      const Sample sample = options.sample(index);
      sizes.seqlen_q = sample.window.seqlen_q;
      sizes.seqlen_k = sample.seqlen_k;
      add(make(sizes), index, 1);
    }
  }

  int64_t tasks() const { return tasks_; }
  int64_t blocks() const { return blocks_; }
  const Segment<Plan>& of_task(int64_t task) const { return find(task, &Segment<Plan>::first_task); }
  const Segment<Plan>& of_block(int64_t block) const { return find(block, &Segment<Plan>::first_block); }
  auto begin() const { return segments_.begin(); }
  auto end() const { return segments_.end(); }

 private:
  void add(const Plan& plan, int64_t first_sample, int64_t samples) {
    segments_.push_back({plan, first_sample, samples, tasks_, blocks_});
    tasks_ += plan.tasks * samples;
    blocks_ += plan.blocks * samples;
  }
  // The last segment that begins at or before `index`.
  const Segment<Plan>& find(int64_t index, int64_t Segment<Plan>::* first) const {
    return *std::prev(std::upper_bound(
        segments_.begin(), segments_.end(), index,
        [first](int64_t value, const Segment<Plan>& segment) { return value < segment.*first; }));
  }

  std::vector<Segment<Plan>> segments_;
  int64_t tasks_ = 0, blocks_ = 0;
};

// A query alone is a matrix-vector product, which plain PyTorch sums in many runs; many queries it sums in one.
constexpr int64_t score_runs(int64_t rows) { return rows == 1 ? 8 : 1; }

// Keeps columns [first, last) of a row of scores that has columns [begin, end), multiples of W; the rest becomes
// `value`.
template <typename A>
inline void mask_row(A* row, int64_t begin, int64_t end, int64_t first, int64_t last, A value) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  const Vec<A> masked = Vec<A>::broadcast(value);
  const auto mask = [&](int64_t column) {
    keep_lanes(first - column, last - column, Vec<A>::load(row + column), masked).store(row + column);
  };
  int64_t column = begin;
  for (; column < std::min(first, end); column += kLanes) mask(column);
  column = std::max(column, round_down(std::max(last, begin), kLanes));
  for (; column < end; column += kLanes) mask(column);
}

}  // namespace leedl
