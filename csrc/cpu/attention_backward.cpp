// Attention, backward: one task owns the keys [key_begin, key_end) of one key head, with their dk and dv.
//
// With P = exp(scale * Q . K^T - lse), delta = rowsum(dout * out) and dS = P * (dout . V^T - delta + dlse):
//     dv = P^T . dout,   dk = scale * dS^T . Q,   dq = scale * dS . K
// (FlashAttention, Dao et al. 2022, appendix B.4).
// A task walks over the blocks of queries that see its keys, for each query head of the group. A block's dq receives
// terms from several tasks, each of which adds its own to dq itself, in an order that the sizes of the problem fix: a
// counter per block tells whose turn it is. Tasks begin in that same order, so the one that is waited for is always
// running.
#include <atomic>
#include <numeric>
#include <thread>
#include <vector>

#include "attention.h"

namespace leedl {
namespace {

constexpr int64_t kBlockStrips = kTileRows == 14 ? 8 : 16;
constexpr int64_t kBlockRows = kBlockStrips * kTileRows;
constexpr int64_t kMaxTaskKeys = 240;
// Score rows hold zeros for kMargin keys beyond what a strip sees, since a tile of dk and dv reads kTileRows keys of a
// row at once.
constexpr int64_t kMargin = 16;
constexpr int64_t kScorePitch = kMaxTaskKeys + 2 * kMargin;  // 17 cache lines of floats: odd, see kHeadPitch
static_assert(kMargin >= kTileRows - 1);

// How a problem is cut into tasks.
struct Plan {
  int64_t task_keys;  // a multiple of the tile's rows and of the vector
  int64_t chunks;     // of keys per key head
  int64_t colors;     // chunks of one color share no query (unless there is one color per chunk)
  int64_t tasks;      // batch * num_heads_k * chunks
  int64_t blocks;     // of queries per query head
  int64_t panels, panels_v;

  template <typename T>
  static Plan make(const AttentionOptions& options) {
    constexpr int64_t kLanes = Vec<T>::kSize;
    constexpr int64_t kUnit = std::lcm(kTileRows, kLanes);
    static_assert(kMargin % kLanes == 0);
    const AttentionSizes& s = options.sizes;
    Plan plan;
    plan.panels = (s.head_dim + kLanes - 1) / kLanes;
    plan.panels_v = (s.head_dim_v + kLanes - 1) / kLanes;
    const int64_t widest = std::max(s.head_dim, s.head_dim_v) * static_cast<int64_t>(sizeof(T));
    plan.task_keys = round_down(widest <= 512 ? kMaxTaskKeys : kMaxTaskKeys / 2, kUnit);
    plan.chunks = (s.seqlen_k + plan.task_keys - 1) / plan.task_keys;
    const int64_t reach = options.window_left + options.window_right + kBlockRows;
    plan.colors = std::max<int64_t>(std::min(1 + (reach + plan.task_keys - 1) / plan.task_keys, plan.chunks), 1);
    plan.tasks = s.batch * s.num_heads_k * plan.chunks;
    plan.blocks = (s.seqlen_q + kBlockRows - 1) / kBlockRows;
    return plan;
  }

  // Tasks begin color by color; the chunks of one color in order.
  int64_t chunk_in_order(int64_t position) const {
    for (int64_t color = 0;; ++color) {
      const int64_t members = (chunks - color + colors - 1) / colors;
      if (position < members) return color + position * colors;
      position -= members;
    }
  }
  // How many of the chunks that hold keys [first, end) begin before `chunk`.
  int64_t rank(int64_t chunk, int64_t first, int64_t end) const {
    int64_t earlier = 0;
    for (int64_t other = first / task_keys; other <= (end - 1) / task_keys; ++other) {
      const int64_t difference = other % colors - chunk % colors;
      earlier += difference < 0 || (difference == 0 && other < chunk);
    }
    return earlier;
  }
};

// The memory of one thread.
template <typename T>
struct Scratch {
  T* keys_t;      // panels of [head_dim][W]: K^T
  T* values_t;    // panels of [head_dim_v][W]: V^T
  T* keys;        // [panels] panels of [task_keys][W]
  T* dk;          // [task_keys][panels * W]
  T* dv;          // [task_keys][panels_v * W]
  T* queries;     // [panels] panels of [kBlockRows][W]
  T* douts;       // [panels_v] panels of [kBlockRows][W]
  T* query_rows;  // [kTileRows][kHeadPitch]
  T* dout_rows;   // [kTileRows][kHeadPitch]
  T* p;           // [kBlockRows][kScorePitch]
  T* ds;          // [kBlockRows][kScorePitch]
  int64_t size;

  Scratch(T* base, const AttentionSizes& s, const Plan& plan) {
    constexpr int64_t kLanes = Vec<T>::kSize;
    Arena<T> arena(base);
    keys_t = arena.take(plan.task_keys * s.head_dim);
    values_t = arena.take(plan.task_keys * s.head_dim_v);
    keys = arena.take(plan.task_keys * plan.panels * kLanes);
    dk = arena.take(plan.task_keys * plan.panels * kLanes);
    dv = arena.take(plan.task_keys * plan.panels_v * kLanes);
    queries = arena.take(kBlockRows * plan.panels * kLanes);
    douts = arena.take(kBlockRows * plan.panels_v * kLanes);
    query_rows = arena.take(kTileRows * kHeadPitch);
    dout_rows = arena.take(kTileRows * kHeadPitch);
    p = arena.take(kBlockRows * kScorePitch);
    ds = arena.take(kBlockRows * kScorePitch);
    size = arena.taken();
  }
};

// What all tasks share.
template <typename T>
struct Shared {
  const AttentionBackward<T>& args;
  const Plan& plan;
  T* delta;                     // (batch, num_heads, seqlen_q)
  std::atomic<int32_t>* turns;  // (batch, num_heads, blocks): how many tasks have added to the block's dq
};

// Fills delta for one block of queries, and zeroes the dq of strips that no task will write. The products are summed in
// the order in which a tile sums dout . V^T: where a row's softmax is nearly one-hot, their difference must not be one
// of roundings.
template <typename T>
void prepare_block(const Shared<T>& shared, int64_t batch, int64_t head, int64_t row_begin) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  const AttentionBackward<T>& args = shared.args;
  const AttentionSizes& s = args.options.sizes;
  const AttentionWindow window = args.options.window(batch);
  const int64_t row_end = std::min(row_begin + kBlockRows, s.seqlen_q);
  T* delta = shared.delta + (batch * s.num_heads + head) * s.seqlen_q;
  alignas(64) T dout[kMaxHeadDim * kLanes], out[kMaxHeadDim * kLanes];  // [head_dim_v][W]
  for (int64_t row = row_begin; row < row_end; row += kLanes) {
    const int64_t rows = std::min(kLanes, row_end - row);
    pack_transposed(dout, args.dout.row(batch, head, row), args.dout.seq_stride, rows, s.head_dim_v);
    pack_transposed(out, args.out.row(batch, head, row), args.out.seq_stride, rows, s.head_dim_v);
    Vec<T> sum = Vec<T>::zero();
    for (int64_t column = 0; column < s.head_dim_v; ++column) {
      sum = mul_add(Vec<T>::load(dout + column * kLanes), Vec<T>::load(out + column * kLanes), sum);
    }
    if (rows == kLanes) {
      sum.store(delta + row);
    } else {
      sum.store_first(delta + row, rows);
    }
  }
  for (int64_t row = row_begin; row < row_end; row += kTileRows) {
    const int64_t end = std::min(row + kTileRows, row_end);
    if (window.key_begin(row) < window.key_end_of(end - 1)) continue;
    for (int64_t r = row; r < end; ++r) std::fill_n(args.dq.row(batch, head, r), s.head_dim, T(0));
  }
}

// One row: scores become P, the very numbers of the forward pass, and dout . V^T becomes dS.
template <typename T>
__attribute__((noinline)) void score_gradients(T* __restrict__ p, T* __restrict__ ds, int64_t columns, T factor,
                                               T row_max, T row_sum, T delta, T dlse) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  const Vec<T> scale = Vec<T>::broadcast(factor), offset = Vec<T>::broadcast(row_max),
               inverse = Vec<T>::broadcast(1 / row_sum);
  const Vec<T> mean = Vec<T>::broadcast(delta), shift = Vec<T>::broadcast(dlse);
  for (int64_t column = 0; column < columns; column += kLanes) {
    const Vec<T> probability = exp2((Vec<T>::load(p + column) - offset) * scale) * inverse;
    probability.store(p + column);
    (probability * ((Vec<T>::load(ds + column) - mean) + shift)).store(ds + column);
  }
}

template <typename T>
class BackwardTask {
 public:
  BackwardTask(const Shared<T>& shared, T* base)
      : shared_(shared),
        args_(shared.args),
        sizes_(shared.args.options.sizes),
        plan_(shared.plan),
        scale_(shared.args.options.softmax_scale),
        scratch_(base, sizes_, plan_) {}

  void run(int64_t batch, int64_t head_k, int64_t chunk) {
    batch_ = batch;
    chunk_ = chunk;
    window_ = args_.options.window(batch);
    key_begin_ = chunk * plan_.task_keys;
    key_end_ = std::min(key_begin_ + plan_.task_keys, sizes_.seqlen_k);
    const int64_t visible_end = std::min(key_end_, window_.key_end);
    const int64_t accumulated = round_up(key_end_ - key_begin_, kTileRows);
    std::fill_n(scratch_.dk, accumulated * plan_.panels * kLanes, T(0));
    std::fill_n(scratch_.dv, accumulated * plan_.panels_v * kLanes, T(0));
    if (key_begin_ < visible_end) {
      const int64_t keys = visible_end - key_begin_;
      const T* k = args_.k.row(batch, head_k, key_begin_);
      const T* v = args_.v.row(batch, head_k, key_begin_);
      pack_transposed(scratch_.keys_t, k, args_.k.seq_stride, keys, sizes_.head_dim);
      pack_transposed(scratch_.values_t, v, args_.v.seq_stride, keys, sizes_.head_dim_v);
      pack_panels(scratch_.keys, plan_.task_keys * kLanes, k, args_.k.seq_stride, keys, sizes_.head_dim);
      const int64_t first_row = round_down(window_.query_begin(key_begin_), kBlockRows);
      const int64_t last_row = window_.query_end_of(visible_end - 1);
      for (int64_t head = head_k * sizes_.group(); head < (head_k + 1) * sizes_.group(); ++head) {
        for (int64_t row = first_row; row < last_row; row += kBlockRows) block(head, row);
      }
    }
    const T scale = static_cast<T>(args_.options.softmax_scale);
    write(args_.dk, head_k, scratch_.dk, plan_.panels, sizes_.head_dim, scale);
    write(args_.dv, head_k, scratch_.dv, plan_.panels_v, sizes_.head_dim_v, T(1));
  }

 private:
  static constexpr int64_t kLanes = Vec<T>::kSize;

  // The keys of this task that a strip sees, counted from key_begin_; key's column in the score rows is kMargin + key.
  struct Strip {
    int64_t row, rows;
    int64_t begin, end;
  };

  // One block of queries: scores, then everything that is made of them.
  void block(int64_t head, int64_t row_begin) {
    const int64_t row_end = std::min(row_begin + kBlockRows, sizes_.seqlen_q);
    const int64_t seen_begin = window_.key_begin(row_begin), seen_end = window_.key_end_of(row_end - 1);
    if (std::max(seen_begin, key_begin_) >= std::min(seen_end, key_end_)) return;

    pack_panels(scratch_.queries, kBlockRows * kLanes, args_.q.row(batch_, head, row_begin), args_.q.seq_stride,
                row_end - row_begin, sizes_.head_dim);
    pack_panels(scratch_.douts, kBlockRows * kLanes, args_.dout.row(batch_, head, row_begin), args_.dout.seq_stride,
                row_end - row_begin, sizes_.head_dim_v);
    Strip strips[kBlockStrips];
    int64_t count = 0;
    for (int64_t row = row_begin; row < row_end; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, row_end - row);
      const int64_t begin = std::max(window_.key_begin(row) - key_begin_, int64_t{0});
      const int64_t end = std::min(window_.key_end_of(row + rows - 1), key_end_) - key_begin_;
      if (begin >= end) continue;
      strips[count] = {row, rows, begin, end};
      scores(head, strips[count], row - row_begin);
      ++count;
    }
    add_columns(scratch_.p, row_begin, row_end, scratch_.douts, plan_.panels_v, scratch_.dv);
    add_columns(scratch_.ds, row_begin, row_end, scratch_.queries, plan_.panels, scratch_.dk);

    std::atomic<int32_t>& turn =
        shared_.turns[(batch_ * sizes_.num_heads + head) * plan_.blocks + row_begin / kBlockRows];
    const int64_t rank = plan_.rank(chunk_, seen_begin, seen_end);
    while (turn.load(std::memory_order_acquire) != rank) std::this_thread::yield();
    for (int64_t i = 0; i < count; ++i) add_rows(head, strips[i], strips[i].row - row_begin);
    turn.store(static_cast<int32_t>(rank + 1), std::memory_order_release);
  }

  // P and dS of one strip, with zeros where a row does not see a key, and for kMargin keys beyond both ends.
  void scores(int64_t head, const Strip& strip, int64_t local_row) {
    const int64_t begin = round_down(strip.begin, kLanes), end = round_up(strip.end, kLanes);
    const int64_t panels = (end - begin) / kLanes;
    T* p = scratch_.p + local_row * kScorePitch + kMargin + begin;
    T* ds = scratch_.ds + local_row * kScorePitch + kMargin + begin;
    pack_rows<kTileRows, kHeadPitch>(scratch_.query_rows, args_.q.row(batch_, head, strip.row), args_.q.seq_stride,
                                     strip.rows, sizes_.head_dim, scale_.sign);
    pack_rows<kTileRows, kHeadPitch>(scratch_.dout_rows, args_.dout.row(batch_, head, strip.row), args_.dout.seq_stride,
                                     strip.rows, sizes_.head_dim_v, T(1));
    score_tile(score_runs(strip.rows), sizes_.head_dim, scratch_.query_rows, scratch_.keys_t + begin * sizes_.head_dim,
               panels, p, kScorePitch);
    score_tile(1, sizes_.head_dim_v, scratch_.dout_rows, scratch_.values_t + begin * sizes_.head_dim_v, panels, ds,
               kScorePitch);

    const int64_t offset = (batch_ * sizes_.num_heads + head) * sizes_.seqlen_q + strip.row;
    const int64_t origin = key_begin_ + begin;
    for (int64_t row = 0; row < strip.rows; ++row, p += kScorePitch, ds += kScorePitch) {
      score_gradients(p, ds, end - begin, scale_.factor, args_.row_max[offset + row], args_.row_sum[offset + row],
                      shared_.delta[offset + row], args_.dlse != nullptr ? args_.dlse[offset + row] : T(0));
      const int64_t first = window_.key_begin(strip.row + row) - origin,
                    last = window_.key_end_of(strip.row + row) - origin;
      mask_row(p, -kMargin, end - begin + kMargin, first, last, T(0));
      mask_row(ds, -kMargin, end - begin + kMargin, first, last, T(0));
    }
  }

  // accumulator += A^T . B, for kTileRows keys at a time over the queries of the block that see one of them.
  void add_columns(const T* a, int64_t row_begin, int64_t row_end, const T* b, int64_t panels, T* accumulator) {
    const int64_t pitch = panels * kLanes;
    const int64_t visible = std::min(window_.key_end, key_end_) - key_begin_;
    for (int64_t key = 0; key < visible; key += kTileRows) {
      const int64_t last_key = std::min(key + kTileRows, visible) - 1;
      const int64_t first = std::max(window_.query_begin(key_begin_ + key), row_begin);
      const int64_t last = std::min(window_.query_end_of(key_begin_ + last_key), row_end);
      if (first >= last) continue;
      T* to = accumulator + key * pitch;
      tile_rows<kTileRows, TileLayout<1, kScorePitch>>(
          last - first, a + (first - row_begin) * kScorePitch + kMargin + key, b + (first - row_begin) * kLanes,
          kBlockRows * kLanes, panels, [&](int64_t row, int64_t panel, Vec<T> value) {
            T* sum = to + row * pitch + panel * kLanes;
            (Vec<T>::load(sum) + value).store(sum);
          });
    }
  }

  // dq += scale * dS . K for one strip; the first chunk that the strip sees writes it.
  void add_rows(int64_t head, const Strip& strip, int64_t local_row) {
    const int64_t seen_begin = window_.key_begin(strip.row), seen_end = window_.key_end_of(strip.row + strip.rows - 1);
    const bool first = plan_.rank(chunk_, seen_begin, seen_end) == 0;
    const Vec<T> scale = Vec<T>::broadcast(static_cast<T>(args_.options.softmax_scale));
    T* dq = args_.dq.row(batch_, head, strip.row);
    tile_rows<kTileRows, TileLayout<kScorePitch, 1>>(
        strip.end - strip.begin, scratch_.ds + local_row * kScorePitch + kMargin + strip.begin,
        scratch_.keys + strip.begin * kLanes, plan_.task_keys * kLanes, plan_.panels,
        [&](int64_t row, int64_t panel, Vec<T> value) {
          if (row >= strip.rows) return;
          T* to = dq + row * args_.dq.seq_stride + panel * kLanes;
          const int64_t width = std::min(sizes_.head_dim - panel * kLanes, kLanes);
          if (width == kLanes) {
            (first ? value * scale : mul_add(value, scale, Vec<T>::load(to))).store(to);
          } else {
            (first ? value * scale : mul_add(value, scale, Vec<T>::load_first(to, width))).store_first(to, width);
          }
        });
  }

  void write(const HeadTensor<T>& tensor, int64_t head_k, const T* from, int64_t panels, int64_t columns, T scale) {
    const Vec<T> factor = Vec<T>::broadcast(scale);
    for (int64_t key = key_begin_; key < key_end_; ++key, from += panels * kLanes) {
      T* to = tensor.row(batch_, head_k, key);
      for (int64_t column = 0; column < columns; column += kLanes) {
        const Vec<T> value = Vec<T>::load(from + column) * factor;
        if (column + kLanes <= columns) {
          value.store(to + column);
        } else {
          value.store_first(to + column, columns - column);
        }
      }
    }
  }

  const Shared<T>& shared_;
  const AttentionBackward<T>& args_;
  const AttentionSizes& sizes_;
  const Plan& plan_;
  const ScoreScale<T> scale_;
  Scratch<T> scratch_;
  AttentionWindow window_;
  int64_t batch_, chunk_, key_begin_, key_end_;
};

}  // namespace

template <typename T>
void attention_backward(const AttentionBackward<T>& args) {
  const AttentionSizes& s = args.options.sizes;
  const Plan plan = Plan::make<T>(args.options);
  const int64_t rows = s.batch * s.num_heads * s.seqlen_q;
  const int64_t query_blocks = s.batch * s.num_heads * plan.blocks;
  const int64_t most = std::max(plan.tasks, query_blocks);
  if (most == 0) return;
  args.dq.advise(s.batch, s.num_heads, s.seqlen_q, s.head_dim);
  args.dk.advise(s.batch, s.num_heads_k, s.seqlen_k, s.head_dim);
  args.dv.advise(s.batch, s.num_heads_k, s.seqlen_k, s.head_dim_v);
  const int threads = static_cast<int>(std::min<int64_t>(std::max(args.options.num_threads, 1), most));
  const int64_t scratch_size = Scratch<T>(nullptr, s, plan).size;
  const Buffer<T> memory = allocate<T>(threads * scratch_size + rows);
  std::vector<std::atomic<int32_t>> turns(query_blocks);
  const Shared<T> shared{args, plan, memory.get() + threads * scratch_size, turns.data()};
  std::atomic<int64_t> next_task{0};

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t index = 0; index < query_blocks; ++index) {
      const int64_t pair = index / plan.blocks;
      prepare_block(shared, pair / s.num_heads, pair % s.num_heads, index % plan.blocks * kBlockRows);
    }
    // Not an OpenMP loop: the order in which tasks begin must be the order of their turns.
    BackwardTask<T> task(shared, memory.get() + omp_get_thread_num() * scratch_size);
    for (int64_t index = next_task++; index < plan.tasks; index = next_task++) {
      const int64_t pair = index % (s.batch * s.num_heads_k);
      task.run(pair / s.num_heads_k, pair % s.num_heads_k, plan.chunk_in_order(index / (s.batch * s.num_heads_k)));
    }
  }
}

template void attention_backward<float>(const AttentionBackward<float>&);
template void attention_backward<double>(const AttentionBackward<double>&);

}  // namespace leedl
