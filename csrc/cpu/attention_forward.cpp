// Attention, forward: one task owns the query rows [row_begin, row_end) of the query heads that share one key head.
//
// A task walks over blocks of keys. It packs a block's keys (transposed) and values once; then every strip of kTileRows
// queries computes its scores S = Q . K^T against the keys that it sees, updates its running maximum and sum, and adds
// P . V to its output (online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022, algorithm 1).
// Where a strip sees few keys one block holds them all, and nothing is ever rescaled. Strips begin at multiples of
// kTileRows and blocks at positions that depend on the sizes of the problem alone, so how rows are divided into tasks
// changes no result.
#include <limits>

#include "attention.h"

namespace leedl {
namespace {

constexpr int64_t kMaxColumns = 560;  // of one strip's scores
constexpr int64_t kScorePitch = 592;  // 37 cache lines of floats: odd, so that the rows spread over the cache's sets
constexpr int64_t kPackedBytes = 256 * 1024;  // of keys and values in one block: they stay in the second-level cache
constexpr int64_t kSinglePassRows = 504;  // rows of a task, where one block holds all that it sees
constexpr int64_t kBlockRows = 252;     // rows of a task, over all heads of the group, where it walks over many blocks
constexpr int64_t kTasksPerThread = 8;  // smaller tasks rather than fewer than this

// How a problem is cut into tasks and blocks.
struct Plan {
  bool single_pass;
  int64_t task_rows, chunks, tasks;  // tasks = batch * num_heads_k * chunks
  int64_t block_keys;                // keys that one block holds at most
  int64_t panels_v;                  // vector panels of a row of values

  template <typename T>
  static Plan make(const AttentionOptions& options) {
    const int64_t threads = std::max(options.num_threads, 1);
    constexpr int64_t kLanes = Vec<T>::kSize;
    const AttentionSizes& s = options.sizes;
    Plan plan;
    plan.panels_v = (s.head_dim_v + kLanes - 1) / kLanes;
    const int64_t span = options.window_left + options.window_right;
    const int64_t strip_columns = std::min(kTileRows + span + 2 * kLanes, s.seqlen_k + kLanes);
    plan.single_pass = strip_columns <= kMaxColumns;

    const int64_t strips = (s.seqlen_q + kTileRows - 1) / kTileRows;
    const int64_t max_strips =
        std::max<int64_t>((plan.single_pass ? kSinglePassRows : kBlockRows / s.group()) / kTileRows, 1);
    const int64_t wanted_strips = std::max<int64_t>(strips * s.batch * s.num_heads_k / (kTasksPerThread * threads), 4);
    const int64_t task_strips = std::min({wanted_strips, max_strips, std::max<int64_t>(strips, 1)});
    plan.task_rows = task_strips * kTileRows;
    plan.chunks = (strips + task_strips - 1) / task_strips;
    plan.tasks = s.batch * s.num_heads_k * plan.chunks;

    if (plan.single_pass) {
      plan.block_keys = round_up(std::min(plan.task_rows + span + kLanes, s.seqlen_k), kLanes);
    } else {
      const int64_t fitting = kPackedBytes / static_cast<int64_t>(sizeof(T)) / (s.head_dim + plan.panels_v * kLanes);
      plan.block_keys = round_down(std::clamp<int64_t>(fitting, 128, 512), 64);
    }
    return plan;
  }
};

// The memory of one thread.
template <typename T>
struct Scratch {
  T* keys;     // [block_keys / W] panels of [head_dim][W]
  T* values;   // [panels_v] panels of [block_keys][W]
  T* queries;  // [kTileRows][kHeadPitch]
  T* scores;   // [kTileRows][kScorePitch]
  T* out;      // per strip [kTileRows][panels_v * W], not yet divided by the sum
  T* row_max;  // per strip [kStripRows]
  T* row_sum;  // per strip [kStripRows]

  static int64_t strips(const AttentionSizes& s, const Plan& plan) {
    return plan.single_pass ? 1 : s.group() * plan.task_rows / kTileRows;
  }
  static int64_t size(const AttentionSizes& s, const Plan& plan) {
    Scratch unused(nullptr, s, plan);
    return unused.size_;
  }
  Scratch(T* base, const AttentionSizes& s, const Plan& plan) {
    constexpr int64_t kLanes = Vec<T>::kSize;
    Arena<T> arena(base);
    keys = arena.take(plan.block_keys * s.head_dim);
    values = arena.take(plan.block_keys * plan.panels_v * kLanes);
    queries = arena.take(kTileRows * kHeadPitch);
    scores = arena.take(kTileRows * kScorePitch);
    out = arena.take(strips(s, plan) * kTileRows * plan.panels_v * kLanes);
    row_max = arena.take(strips(s, plan) * kStripRows);
    row_sum = arena.take(strips(s, plan) * kStripRows);
    size_ = arena.taken();
  }

 private:
  int64_t size_;
};

// Replaces the scores of a strip by exp2((score - maximum) * factor), where the maximum includes that of earlier
// blocks; adds to the sums; rescale[row] is what outputs and sums so far must be multiplied by. Rows go in pairs, so
// that two chains of maxima or sums run side by side.
template <typename T>
__attribute__((noinline)) void softmax_rows(T* scores, int64_t columns, T factor, T* row_max, T* row_sum, T* rescale) {
  static_assert(kTileRows % 2 == 0);
  constexpr int64_t kLanes = Vec<T>::kSize;
  alignas(64) T largest[kStripRows], offsets[kStripRows], sums[kStripRows] = {};
  std::copy(row_max, row_max + kStripRows, largest);
  const Vec<T> scale = Vec<T>::broadcast(factor);
  for (int64_t row = 0; row < kTileRows; row += 2) {
    const T* score = scores + row * kScorePitch;
    Vec<T> top0 = Vec<T>::broadcast(row_max[row]), top1 = Vec<T>::broadcast(row_max[row + 1]);
    Vec<T> odd0 = top0, odd1 = top1;
    int64_t column = 0;
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
      top0 = max(Vec<T>::load(score + column), top0);
      odd0 = max(Vec<T>::load(score + column + kLanes), odd0);
      top1 = max(Vec<T>::load(score + kScorePitch + column), top1);
      odd1 = max(Vec<T>::load(score + kScorePitch + column + kLanes), odd1);
    }
    if (column < columns) {
      top0 = max(Vec<T>::load(score + column), top0);
      top1 = max(Vec<T>::load(score + kScorePitch + column), top1);
    }
    largest[row] = reduce_max(max(odd0, top0));
    largest[row + 1] = reduce_max(max(odd1, top1));
  }
  for (int64_t row = 0; row < kStripRows; row += kLanes) {
    // A row that has seen no key yet keeps -inf, but subtracts 0: -inf - -inf would be NaN.
    const Vec<T> now = Vec<T>::load(largest + row);
    const Vec<T> offset = zero_below(now, std::numeric_limits<T>::lowest(), now);
    exp2((Vec<T>::load(row_max + row) - offset) * scale).store(rescale + row);
    offset.store(offsets + row);
    now.store(row_max + row);
  }
  for (int64_t row = 0; row < kTileRows; row += 2) {
    T* score = scores + row * kScorePitch;
    const Vec<T> offset0 = Vec<T>::broadcast(offsets[row]), offset1 = Vec<T>::broadcast(offsets[row + 1]);
    Vec<T> sum0 = Vec<T>::zero(), sum1 = Vec<T>::zero();
    for (int64_t column = 0; column < columns; column += kLanes) {
      const Vec<T> p0 = exp2((Vec<T>::load(score + column) - offset0) * scale);
      const Vec<T> p1 = exp2((Vec<T>::load(score + kScorePitch + column) - offset1) * scale);
      p0.store(score + column);
      p1.store(score + kScorePitch + column);
      sum0 = sum0 + p0;
      sum1 = sum1 + p1;
    }
    sums[row] = reduce_add(sum0);
    sums[row + 1] = reduce_add(sum1);
  }
  for (int64_t row = 0; row < kStripRows; row += kLanes) {
    mul_add(Vec<T>::load(row_sum + row), Vec<T>::load(rescale + row), Vec<T>::load(sums + row)).store(row_sum + row);
  }
}

template <typename T>
class ForwardTask {
 public:
  ForwardTask(const AttentionForward<T>& args, const Plan& plan, T* base)
      : args_(args),
        sizes_(args.options.sizes),
        plan_(plan),
        scale_(args.options.softmax_scale),
        scratch_(base, sizes_, plan) {}

  void run(int64_t batch, int64_t head_k, int64_t row_begin, int64_t row_end) {
    batch_ = batch;
    window_ = args_.options.window(batch);
    const int64_t key_begin = window_.key_begin(row_begin);
    const int64_t key_end = window_.key_end_of(row_end - 1);
    const int64_t first_head = head_k * sizes_.group();
    for (int64_t head = first_head; head < first_head + sizes_.group(); ++head) {
      for (int64_t row = row_begin; row < row_end; row += kTileRows) {
        if (window_.key_begin(row) >= window_.key_end_of(last_row(row))) write_masked(head, row);
      }
    }
    int64_t begin = round_down(key_begin, plan_.single_pass ? kLanes : plan_.block_keys);
    for (; begin < key_end; begin += plan_.block_keys) {
      const int64_t end = std::min(begin + plan_.block_keys, key_end);
      pack_transposed(scratch_.keys, args_.k.row(batch, head_k, begin), args_.k.seq_stride, end - begin,
                      sizes_.head_dim);
      pack_panels(scratch_.values, plan_.block_keys * kLanes, args_.v.row(batch, head_k, begin), args_.v.seq_stride,
                  end - begin, sizes_.head_dim_v);
      for (int64_t head = first_head; head < first_head + sizes_.group(); ++head) {
        for (int64_t row = row_begin; row < row_end; row += kTileRows) {
          const int64_t local = ((head - first_head) * plan_.task_rows + row - row_begin) / kTileRows;
          strip(head, row, plan_.single_pass ? 0 : local, begin, end);
        }
      }
    }
  }

 private:
  static constexpr int64_t kLanes = Vec<T>::kSize;

  int64_t last_row(int64_t row) const { return std::min(row + kTileRows, sizes_.seqlen_q) - 1; }

  // One strip of queries against the keys of one block that it sees.
  void strip(int64_t head, int64_t row, int64_t local, int64_t block_begin, int64_t block_end) {
    const int64_t rows = last_row(row) + 1 - row;
    const int64_t strip_begin = window_.key_begin(row);
    const int64_t strip_end = window_.key_end_of(last_row(row));
    const int64_t begin = std::max(strip_begin, block_begin) - block_begin;
    const int64_t end = std::min(strip_end, block_end) - block_begin;
    if (begin >= end) return;

    T* row_max = scratch_.row_max + local * kStripRows;
    T* row_sum = scratch_.row_sum + local * kStripRows;
    const bool first = strip_begin >= block_begin;
    if (first) {
      std::fill(row_max, row_max + kStripRows, -std::numeric_limits<T>::infinity());
      std::fill(row_sum, row_sum + kStripRows, T(0));
    }

    pack_rows<kTileRows, kHeadPitch>(scratch_.queries, args_.q.row(batch_, head, row), args_.q.seq_stride, rows,
                                     sizes_.head_dim, scale_.sign);
    // Columns of the scores count from column_begin, a multiple of W, so that a strip uses the same few cache lines
    // always.
    const int64_t column_begin = round_down(begin, kLanes);
    const int64_t columns = round_up(end, kLanes) - column_begin;
    T* scores = scratch_.scores;
    score_tile(score_runs(rows), sizes_.head_dim, scratch_.queries, scratch_.keys + column_begin * sizes_.head_dim,
               columns / kLanes, scores, kScorePitch);

    const int64_t origin = block_begin + column_begin;
    if (window_.key_begin(last_row(row)) > origin || window_.key_end_of(row) < origin + columns) {
      for (int64_t r = 0; r < rows; ++r) {
        mask_row(scores + r * kScorePitch, 0, columns, window_.key_begin(row + r) - origin,
                 window_.key_end_of(row + r) - origin, -std::numeric_limits<T>::infinity());
      }
    }

    alignas(64) T rescale[kStripRows];
    softmax_rows(scores, columns, scale_.factor, row_max, row_sum, rescale);
    add_values(local, begin - column_begin, begin, end, first, rescale);
    if (strip_end <= block_end) write(head, row, rows, local);
  }

  // out = out * rescale + P . V over the keys [begin, end) of the block, exactly: keys that no row sees may hold NaN.
  void add_values(int64_t local, int64_t column, int64_t begin, int64_t end, bool first, const T* rescale) {
    const int64_t pitch = plan_.panels_v * kLanes;
    T* out = scratch_.out + local * kTileRows * pitch;
    const T* p = scratch_.scores + column;
    const T* values = scratch_.values + begin * kLanes;
    using Layout = TileLayout<kScorePitch, 1>;
    if (first) {
      tile_rows<kTileRows, Layout>(
          end - begin, p, values, plan_.block_keys * kLanes, plan_.panels_v,
          [&](int64_t r, int64_t panel, Vec<T> value) { value.store(out + r * pitch + panel * kLanes); });
    } else {
      tile_rows<kTileRows, Layout>(end - begin, p, values, plan_.block_keys * kLanes, plan_.panels_v,
                                   [&](int64_t r, int64_t panel, Vec<T> value) {
                                     T* to = out + r * pitch + panel * kLanes;
                                     mul_add(Vec<T>::load(to), Vec<T>::broadcast(rescale[r]), value).store(to);
                                   });
    }
  }

  void write(int64_t head, int64_t row, int64_t rows, int64_t local) {
    const int64_t pitch = plan_.panels_v * kLanes;
    const T* row_max = scratch_.row_max + local * kStripRows;
    const T* row_sum = scratch_.row_sum + local * kStripRows;
    alignas(64) T inverse[kStripRows], logarithm[kStripRows];
    for (int64_t r = 0; r < kStripRows; r += kLanes) {
      const Vec<T> sum = Vec<T>::load(row_sum + r);
      (Vec<T>::broadcast(1) / sum).store(inverse + r);
      mul_add(Vec<T>::load(row_max + r), Vec<T>::broadcast(scale_.magnitude), log(sum)).store(logarithm + r);
    }
    const T* from = scratch_.out + local * kTileRows * pitch;
    for (int64_t r = 0; r < rows; ++r, from += pitch) {
      if (row_sum[r] == 0) {
        write_masked_row(head, row + r);
        continue;
      }
      T* to = args_.out.row(batch_, head, row + r);
      const Vec<T> factor = Vec<T>::broadcast(inverse[r]);
      int64_t column = 0;
      for (; column + kLanes <= sizes_.head_dim_v; column += kLanes)
        (Vec<T>::load(from + column) * factor).store(to + column);
      if (column < sizes_.head_dim_v)
        (Vec<T>::load(from + column) * factor).store_first(to + column, sizes_.head_dim_v - column);
      write_statistics(head, row + r, logarithm[r], row_max[r], row_sum[r]);
    }
  }

  void write_masked(int64_t head, int64_t row) {
    for (int64_t r = row; r <= last_row(row); ++r) write_masked_row(head, r);
  }

  void write_masked_row(int64_t head, int64_t row) {
    T* to = args_.out.row(batch_, head, row);
    std::fill(to, to + sizes_.head_dim_v, T(0));
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    write_statistics(head, row, -kInfinity, kInfinity, T(1));
  }

  void write_statistics(int64_t head, int64_t row, T lse, T row_max, T row_sum) const {
    const int64_t index = (batch_ * sizes_.num_heads + head) * sizes_.seqlen_q + row;
    args_.lse[index] = lse;
    args_.row_max[index] = row_max;
    args_.row_sum[index] = row_sum;
  }

  const AttentionForward<T>& args_;
  const AttentionSizes& sizes_;
  const Plan& plan_;
  const ScoreScale<T> scale_;
  Scratch<T> scratch_;
  AttentionWindow window_;
  int64_t batch_;
};

}  // namespace

template <typename T>
void attention_forward(const AttentionForward<T>& args) {
  const AttentionSizes& s = args.options.sizes;
  const Plan plan = Plan::make<T>(args.options);
  if (plan.tasks == 0) return;
  args.out.advise(s.batch, s.num_heads, s.seqlen_q, s.head_dim_v);
  const int threads = static_cast<int>(std::min<int64_t>(std::max(args.options.num_threads, 1), plan.tasks));
  const int64_t scratch_size = Scratch<T>::size(s, plan);
  const Buffer<T> memory = allocate<T>(threads * scratch_size);

#pragma omp parallel num_threads(threads)
  {
    ForwardTask<T> task(args, plan, memory.get() + omp_get_thread_num() * scratch_size);
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < plan.tasks; ++index) {
      // The last rows first: with a causal window they are the longest tasks.
      const int64_t chunk = plan.chunks - 1 - index / (s.batch * s.num_heads_k);
      const int64_t pair = index % (s.batch * s.num_heads_k);
      const int64_t row_begin = chunk * plan.task_rows;
      task.run(pair / s.num_heads_k, pair % s.num_heads_k, row_begin, std::min(row_begin + plan.task_rows, s.seqlen_q));
    }
  }
}

template void attention_forward<float>(const AttentionForward<float>&);
template void attention_forward<double>(const AttentionForward<double>&);

}  // namespace leedl
