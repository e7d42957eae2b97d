// Attention, backward: one task owns the keys [key_begin, key_end) of one key head, with their dk and dv.
//
// With P = exp(scale * Q . K^T - lse), delta = rowsum(dout * out) and dS = P * (dout . V^T - delta + dlse):
//     dv = P^T . dout,   dk = scale * dS^T . Q,   dq = scale * dS . K
// (FlashAttention, Dao et al. 2022, appendix B.4; leedl_fast/reference/attention.py has the whole of it).
// A task walks over the blocks of queries that see its keys, for each query head of the group. A block's dq receives
// terms from several tasks, each of which adds its own to dq itself, in an order that the sizes of the problem fix: a
// counter per block tells whose turn it is. Tasks begin in that same order, so the one that is waited for is always
// running. The gradient of a bias that samples or heads share is added up in turns too.
#include <numeric>

#include "attention_bias_gradient.h"
#include "attention_scores.h"

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
  int64_t task_keys;      // a multiple of the tile's rows and of the vector
  int64_t chunks;         // of keys per key head
  int64_t colors;         // chunks of one color share no query (unless there is one color per chunk)
  int64_t query_blocks;   // per query head
  int64_t tasks, blocks;  // of one sample: num_heads_k * chunks and num_heads * query_blocks
  int64_t panels, panels_v;

  template <typename A>
  static Plan make(const AttentionOptions& options, const AttentionSizes& s) {
    constexpr int64_t kLanes = Vec<A>::kSize;
    constexpr int64_t kUnit = std::lcm(kTileRows, kLanes);
    static_assert(kMargin % kLanes == 0);
    Plan plan;
    plan.panels = (s.head_dim + kLanes - 1) / kLanes;
    plan.panels_v = (s.head_dim_v + kLanes - 1) / kLanes;
    const int64_t widest = std::max(s.head_dim, s.head_dim_v) * static_cast<int64_t>(sizeof(A));
    plan.task_keys = round_down(widest <= 512 ? kMaxTaskKeys : kMaxTaskKeys / 2, kUnit);
    plan.chunks = (s.seqlen_k + plan.task_keys - 1) / plan.task_keys;
    const int64_t reach = options.window_left + options.window_right + kBlockRows;
    plan.colors = std::max<int64_t>(std::min(1 + (reach + plan.task_keys - 1) / plan.task_keys, plan.chunks), 1);
    plan.query_blocks = (s.seqlen_q + kBlockRows - 1) / kBlockRows;
    plan.tasks = s.num_heads_k * plan.chunks;
    plan.blocks = s.num_heads * plan.query_blocks;
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

// The memory of one thread. Operands hold E, sums are A; see Operand. P and dS of a block of queries are operands twice:
// `p` and `ds` as the transposed left side of dv and dk, `ds_rows` as the left side of dq. Numbers that are operands as
// they stand (E is A) lie there once, and are made in place; pairs are made of a strip's numbers.
template <typename E, typename A = typename Operand<E>::Sum>
struct Scratch {
  static constexpr bool kInPlace = std::is_same_v<E, A>;

  E* keys_t;      // panels of [depth(head_dim)][W]: K^T
  E* values_t;    // panels of [depth(head_dim_v)][W]: V^T
  E* keys;        // [panels] panels of [depth(task_keys)][W]
  A* dk;          // [task_keys][panels * W]
  A* dv;          // [task_keys][panels_v * W]
  E* queries;     // [panels] panels of [depth(kBlockRows)][W]
  E* douts;       // [panels_v] panels of [depth(kBlockRows)][W]
  E* query_rows;  // [kTileRows][kHeadPitch]
  E* dout_rows;   // [kTileRows][kHeadPitch]
  E* p;           // [depth(kBlockRows)][kScorePitch]
  E* ds;          // [depth(kBlockRows)][kScorePitch]
  E* ds_rows;     // [kBlockRows][kScorePitch]
  A* strip_p;     // [kTileRows][kScorePitch], where not in place
  A* strip_ds;    // the same
  A* factors;     // of dropout, [kScorePitch]
  A* slopes;      // of softcap, [kScorePitch]
  int64_t bytes;

  Scratch(std::byte* base, const AttentionSizes& s, const Plan& plan) {
    constexpr int64_t kLanes = Vec<A>::kSize;
    ByteArena arena(base);
    arena.take(keys_t, plan.task_keys * depth_of<E>(s.head_dim));
    arena.take(values_t, plan.task_keys * depth_of<E>(s.head_dim_v));
    arena.take(keys, depth_of<E>(plan.task_keys) * plan.panels * kLanes);
    arena.take(dk, plan.task_keys * plan.panels * kLanes);
    arena.take(dv, plan.task_keys * plan.panels_v * kLanes);
    arena.take(queries, depth_of<E>(kBlockRows) * plan.panels * kLanes);
    arena.take(douts, depth_of<E>(kBlockRows) * plan.panels_v * kLanes);
    arena.take(query_rows, kTileRows * kHeadPitch);
    arena.take(dout_rows, kTileRows * kHeadPitch);
    arena.take(p, depth_of<E>(kBlockRows) * kScorePitch);
    arena.take(ds, depth_of<E>(kBlockRows) * kScorePitch);
    if constexpr (kInPlace) {
      ds_rows = ds;
    } else {
      arena.take(ds_rows, kBlockRows * kScorePitch);
      arena.take(strip_p, kTileRows * kScorePitch);
      arena.take(strip_ds, kTileRows * kScorePitch);
    }
    arena.take(factors, kScorePitch);
    arena.take(slopes, kScorePitch);
    bytes = arena.taken();
  }
};

// What all tasks share.
template <typename T>
struct Shared {
  using A = Accumulate<T>;

  const AttentionBackward<T>& args;
  const Scores<T>& scores;
  BiasGradient<A>& bias_gradient;
  A* delta;         // (batch, num_heads, seqlen_q), divided by Scores::kept
  A* dq;            // (batch, num_heads, seqlen_q, panels * W): sums so far, where dq itself has two bytes
  A* sink_parts;    // what each block of queries adds to dsinks
  Turn* turns;      // of each block of queries: how many tasks have added to its dq
};

// Fills delta for one block of queries, and zeroes the dq of strips that no task will write. The products are summed in
// the order in which a tile sums dout . V^T: where a row's softmax is nearly one-hot, their difference must not be one
// of roundings.
template <typename T>
void prepare_block(const Shared<T>& shared, const Sample& sample, int64_t head, int64_t row_begin, int64_t block) {
  using A = Accumulate<T>;
  constexpr int64_t kLanes = Vec<A>::kSize;
  const AttentionBackward<T>& args = shared.args;
  const AttentionSizes& s = args.options.sizes;
  const int64_t row_end = std::min(row_begin + kBlockRows, sample.window.seqlen_q);
  alignas(64) A dout[kMaxHeadDim * kLanes], out[kMaxHeadDim * kLanes];  // [head_dim_v][W]
  const Vec<A> kept = Vec<A>::broadcast(shared.scores.kept());
  Vec<A> sink_sum = Vec<A>::zero();
  for (int64_t row = row_begin; row < row_end && shared.scores.softmax(); row += kLanes) {
    const int64_t rows = std::min(kLanes, row_end - row);
    const int64_t index = args.options.statistics_index(sample, head, row);
    pack_transposed(dout, args.dout.query(sample, head, row), args.dout.seq_stride, rows, s.head_dim_v);
    pack_transposed(out, args.out.query(sample, head, row), args.out.seq_stride, rows, s.head_dim_v);
    Vec<A> sum = Vec<A>::zero();
    const int64_t run = (s.head_dim_v + shared.scores.gradient_runs() - 1) / shared.scores.gradient_runs();
    for (int64_t begin = 0; begin < s.head_dim_v; begin += run) {
      Vec<A> part = Vec<A>::zero();
      for (int64_t column = begin; column < std::min(begin + run, s.head_dim_v); ++column) {
        Vec<A> o = Vec<A>::load(out + column * kLanes);
        if (shared.scores.drops()) o = o / kept;
        part = mul_add(Vec<A>::load(dout + column * kLanes), o, part);
      }
      sum = begin == 0 ? part : sum + part;
    }
    sum.store_first(shared.delta + index, rows);
    if (shared.scores.has_sinks()) {
      const Vec<A> dlse = args.dlse == nullptr ? Vec<A>::zero() : Vec<A>::load_first(args.dlse + index, rows);
      const Vec<A> distance =
          Vec<A>::broadcast(shared.scores.sink(head)) - Vec<A>::load_first(args.row_max + index, rows);
      const Vec<A> probability = exp2(distance * Vec<A>::broadcast(shared.scores.scale().factor)) /
                                 Vec<A>::load_first(args.row_sum + index, rows);
      sink_sum = sink_sum + keep_lanes(0, rows, probability * (dlse - sum * kept), Vec<A>::zero());
    }
  }
  shared.sink_parts[block] = reduce_add(sink_sum);
  const AttentionWindow& window = sample.window;
  for (int64_t row = row_begin; row < row_end; row += kTileRows) {
    const int64_t end = std::min(row + kTileRows, row_end);
    if (window.key_begin(row) < window.key_end_of(end - 1)) continue;
    for (int64_t r = row; r < end; ++r) std::fill_n(args.dq.query(sample, head, r), s.head_dim, T{});
  }
}

// One row: scores become P, the very numbers of the forward pass, and dout . V^T (where dropout keeps it) becomes dS.
template <typename A>
__attribute__((noinline)) void score_gradients(A* __restrict__ p, A* __restrict__ ds, int64_t columns, A factor,
                                               A row_max, A row_sum, A delta, A kept, A dlse) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  const Vec<A> scale = Vec<A>::broadcast(factor), offset = Vec<A>::broadcast(row_max),
               sum = Vec<A>::broadcast(row_sum), inverse = Vec<A>::broadcast(1 / row_sum);
  const Vec<A> mean = Vec<A>::broadcast(delta), gain = Vec<A>::broadcast(kept), shift = Vec<A>::broadcast(dlse);
  for (int64_t column = 0; column < columns; column += kLanes) {
    const Vec<A> exponential = exp2((Vec<A>::load(p + column) - offset) * scale);
    // A double has no better reference than plain PyTorch, which rounds once here.
    const Vec<A> probability = sizeof(A) == 8 ? exponential / sum : exponential * inverse;
    probability.store(p + column);
    (probability * mul_add(Vec<A>::load(ds + column) - mean, gain, shift)).store(ds + column);
  }
}

template <typename T, typename E>
class BackwardTask {
 public:
  BackwardTask(const Shared<T>& shared, std::byte* base)
      : shared_(shared),
        args_(shared.args),
        sizes_(shared.args.options.sizes),
        scores_(shared.scores),
        base_(base),
        scratch_(nullptr, sizes_, Plan{}) {}

  // first_block: of the sample, in shared.turns.
  void run(const Plan& plan, const Sample& sample, int64_t first_block, int64_t head_k, int64_t chunk) {
    plan_ = plan;
    scratch_ = Scratch<E>(base_, sizes_, plan);
    sample_ = sample;
    window_ = sample.window;
    first_block_ = first_block;
    chunk_ = chunk;
    key_begin_ = chunk * plan_.task_keys;
    key_end_ = std::min(key_begin_ + plan_.task_keys, sample.seqlen_k);
    const int64_t visible_end = std::min(key_end_, window_.key_end);
    const int64_t accumulated = round_up(key_end_ - key_begin_, kTileRows);
    std::fill_n(scratch_.dk, accumulated * plan_.panels * kLanes, A(0));
    std::fill_n(scratch_.dv, accumulated * plan_.panels_v * kLanes, A(0));
    const int64_t first_head = head_k * sizes_.group(), end_head = first_head + sizes_.group();
    BiasTask bias_task(shared_.bias_gradient, omp_get_thread_num(), sample.batch, first_head, chunk,
                       key_end_ - key_begin_);
    if (key_begin_ < visible_end) {
      const int64_t keys = visible_end - key_begin_;
      const T* k = args_.k.key(sample_, head_k, key_begin_);
      const T* v = args_.v.key(sample_, head_k, key_begin_);
      pack_transposed(scratch_.keys_t, k, args_.k.seq_stride, keys, sizes_.head_dim);
      pack_transposed(scratch_.values_t, v, args_.v.seq_stride, keys, sizes_.head_dim_v);
      pack_panels(scratch_.keys, depth_of<E>(plan_.task_keys) * kLanes, k, args_.k.seq_stride, keys, sizes_.head_dim);
      const int64_t first_row = round_down(window_.query_begin(key_begin_), kBlockRows);
      const int64_t last_row = window_.query_end_of(visible_end - 1);
      for (int64_t row = first_row; row < last_row; row += kBlockRows) {
        for (int64_t head = first_head; head < end_head; ++head) block(head, row, bias_task);
      }
    }
    bias_task.finish();
    write(args_.dk, head_k, scratch_.dk, plan_.panels, sizes_.head_dim, static_cast<A>(args_.options.softmax_scale));
    write(args_.dv, head_k, scratch_.dv, plan_.panels_v, sizes_.head_dim_v, scores_.kept());
  }

 private:
  using A = Accumulate<T>;
  using BiasTask = typename BiasGradient<A>::Task;
  static constexpr int64_t kLanes = Vec<A>::kSize;
  static constexpr int64_t kDepth = Operand<E>::kDepth;
  static_assert(kBlockRows % kDepth == 0 && kTileRows % kDepth == 0 && kMargin % kDepth == 0);

  // The keys of this task that a strip sees, counted from key_begin_; key's column in the score rows is kMargin + key.
  struct Strip {
    int64_t row, rows;
    int64_t begin, end;
  };

  // One block of queries: scores, then everything that is made of them.
  void block(int64_t head, int64_t row_begin, BiasTask& bias_task) {
    const int64_t row_end = std::min(row_begin + kBlockRows, window_.seqlen_q);
    const int64_t seen_begin = window_.key_begin(row_begin), seen_end = window_.key_end_of(row_end - 1);
    if (std::max(seen_begin, key_begin_) >= std::min(seen_end, key_end_)) return;

    pack_panels(scratch_.queries, kBlockPanel, args_.q.query(sample_, head, row_begin), args_.q.seq_stride,
                row_end - row_begin, sizes_.head_dim);
    pack_panels(scratch_.douts, kBlockPanel, args_.dout.query(sample_, head, row_begin), args_.dout.seq_stride,
                row_end - row_begin, sizes_.head_dim_v);
    Strip strips[kBlockStrips];
    int64_t count = 0;
    bias_task.begin_block(head, row_begin);
    for (int64_t row = row_begin; row < row_end; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, row_end - row);
      const int64_t begin = std::max(window_.key_begin(row) - key_begin_, int64_t{0});
      const int64_t end = std::min(window_.key_end_of(row + rows - 1), key_end_) - key_begin_;
      if (begin >= end) continue;
      strips[count] = {row, rows, begin, end};
      scores(head, strips[count], row - row_begin, bias_task);
      ++count;
    }
    bias_task.end_block();
    add_columns(scratch_.p, row_begin, row_end, scratch_.douts, plan_.panels_v, scratch_.dv);
    add_columns(scratch_.ds, row_begin, row_end, scratch_.queries, plan_.panels, scratch_.dk);

    Turn& turn = shared_.turns[first_block_ + head * plan_.query_blocks + row_begin / kBlockRows];
    turn.wait_for(plan_.rank(chunk_, seen_begin, seen_end));
    for (int64_t i = 0; i < count; ++i) add_rows(head, strips[i], strips[i].row - row_begin);
    turn.pass_on();
  }

  // P and dS of one strip, with zeros where a row does not see a key, and for kMargin keys beyond both ends.
  void scores(int64_t head, const Strip& strip, int64_t local_row, BiasTask& bias_task) {
    const int64_t begin = round_down(strip.begin, kLanes), end = round_up(strip.end, kLanes);
    const int64_t columns = end - begin, first_column = kMargin + begin;
    A *p, *ds;
    if constexpr (Scratch<E>::kInPlace) {
      p = scratch_.p + local_row * kScorePitch + first_column;
      ds = scratch_.ds + local_row * kScorePitch + first_column;
    } else {
      p = scratch_.strip_p + first_column;
      ds = scratch_.strip_ds + first_column;
    }
    pack_rows<kTileRows, kHeadPitch>(scratch_.query_rows, args_.q.query(sample_, head, strip.row), args_.q.seq_stride,
                                     strip.rows, sizes_.head_dim, scores_.scale().sign);
    pack_rows<kTileRows, kHeadPitch>(scratch_.dout_rows, args_.dout.query(sample_, head, strip.row),
                                     args_.dout.seq_stride, strip.rows, sizes_.head_dim_v, A(1));
    const int64_t depth = depth_of<E>(sizes_.head_dim), depth_v = depth_of<E>(sizes_.head_dim_v);
    score_tile(score_runs(strip.rows), depth, scratch_.query_rows, scratch_.keys_t + begin * depth, columns / kLanes, p,
               kScorePitch);
    score_tile(scores_.gradient_runs(), depth_v, scratch_.dout_rows, scratch_.values_t + begin * depth_v, columns / kLanes, ds, kScorePitch);

    const int64_t offset = args_.options.statistics_index(sample_, head, strip.row);
    const int64_t origin = key_begin_ + begin;
    for (int64_t r = 0; r < strip.rows; ++r) {
      A *row_p = p + r * kScorePitch, *row_ds = ds + r * kScorePitch;
      const int64_t row = strip.row + r;
      if (scores_.modified()) scores_.modify(sample_, head, row, origin, columns, row_p, scratch_.slopes);
      if (scores_.drops()) {
        scores_.dropout_factors(sample_, head, row, origin, columns, scratch_.factors);
        multiply_row(row_ds, scratch_.factors, columns);
      }
      if (scores_.softmax()) {
        score_gradients(row_p, row_ds, columns, scores_.scale().factor, args_.row_max[offset + r],
                        args_.row_sum[offset + r], shared_.delta[offset + r], scores_.kept(),
                        args_.dlse != nullptr ? args_.dlse[offset + r] : A(0));
      } else {
        scores_.activate_backward(row_p, row_ds, columns);
      }
      if (scores_.drops()) multiply_row(row_p, scratch_.factors, columns);
      const int64_t first = window_.key_begin(row) - origin, last = window_.key_end_of(row) - origin;
      mask_row(row_p, -kMargin, columns + kMargin, first, last, A(0));
      mask_row(row_ds, -kMargin, columns + kMargin, first, last, A(0));
      bias_task.add(row, begin, std::min(columns, key_end_ - origin), row_ds);
      if (scores_.capped()) multiply_row(row_ds, scratch_.slopes, columns);
    }
    if constexpr (!Scratch<E>::kInPlace) pack_strip(strip, local_row, begin, columns);
  }

  // The strip's P and dS as pairs, margins included.
  void pack_strip(const Strip& strip, int64_t local_row, int64_t begin, int64_t columns) {
    const int64_t width = columns + 2 * kMargin;
    if (strip.rows % 2 != 0) {
      std::fill_n(scratch_.strip_p + strip.rows * kScorePitch + begin, width, A(0));
      std::fill_n(scratch_.strip_ds + strip.rows * kScorePitch + begin, width, A(0));
    }
    for (int64_t r = 0; r < strip.rows; r += 2) {
      const int64_t to = (local_row + r) / 2 * kScorePitch + begin;
      const A *p = scratch_.strip_p + r * kScorePitch + begin, *ds = scratch_.strip_ds + r * kScorePitch + begin;
      pack_columns(scratch_.p + to, p, p + kScorePitch, width);
      pack_columns(scratch_.ds + to, ds, ds + kScorePitch, width);
    }
    for (int64_t r = 0; r < strip.rows; ++r) {
      pack_row(scratch_.ds_rows + (local_row + r) * kScorePitch + begin / 2, scratch_.strip_ds + r * kScorePitch + begin,
               width);
    }
  }

  // accumulator += A^T . B, for kTileRows keys at a time over the queries of the block that see one of them.
  void add_columns(const E* a, int64_t row_begin, int64_t row_end, const E* b, int64_t panels, A* accumulator) {
    const int64_t pitch = panels * kLanes;
    const int64_t visible = std::min(window_.key_end, key_end_) - key_begin_;
    for (int64_t key = 0; key < visible; key += kTileRows) {
      const int64_t last_key = std::min(key + kTileRows, visible) - 1;
      const int64_t first = std::max(window_.query_begin(key_begin_ + key), row_begin) - row_begin;
      const int64_t last = std::min(window_.query_end_of(key_begin_ + last_key), row_end) - row_begin;
      if (first >= last) continue;
      A* to = accumulator + key * pitch;
      tile_rows<kTileRows, TileLayout<1, kScorePitch>>(
          depth_of<E>(last) - first / kDepth, a + first / kDepth * kScorePitch + kMargin + key,
          b + first / kDepth * kLanes, kBlockPanel, panels, [&](int64_t row, int64_t panel, Vec<A> value) {
            A* sum = to + row * pitch + panel * kLanes;
            (Vec<A>::load(sum) + value).store(sum);
          });
    }
  }

  // dq += scale * dS . K for one strip. The first chunk that the strip sees begins the sum, the last one rounds it.
  void add_rows(int64_t head, const Strip& strip, int64_t local_row) {
    const int64_t seen_begin = window_.key_begin(strip.row), seen_end = window_.key_end_of(strip.row + strip.rows - 1);
    const int64_t rank = plan_.rank(chunk_, seen_begin, seen_end);
    const bool first = rank == 0;
    const bool last = rank == (seen_end - 1) / plan_.task_keys - seen_begin / plan_.task_keys;
    const Vec<A> scale = Vec<A>::broadcast(static_cast<A>(args_.options.softmax_scale));
    T* dq = args_.dq.query(sample_, head, strip.row);
    A* sums;
    int64_t stride;
    if constexpr (std::is_same_v<T, A>) {
      sums = dq;
      stride = args_.dq.seq_stride;
    } else {
      stride = plan_.panels * kLanes;
      sums = shared_.dq + args_.options.statistics_index(sample_, head, strip.row) * stride;
    }
    tile_rows<kTileRows, TileLayout<kScorePitch, 1>>(
        depth_of<E>(strip.end) - strip.begin / kDepth,
        scratch_.ds_rows + local_row * kScorePitch + (kMargin + strip.begin) / kDepth,
        scratch_.keys + strip.begin / kDepth * kLanes, depth_of<E>(plan_.task_keys) * kLanes, plan_.panels,
        [&](int64_t row, int64_t panel, Vec<A> value) {
          if (row >= strip.rows) return;
          A* sum = sums + row * stride + panel * kLanes;
          const int64_t width = std::min(sizes_.head_dim - panel * kLanes, kLanes);
          if (first) {
            value = value * scale;
          } else if (width == kLanes) {
            value = mul_add(value, scale, Vec<A>::load(sum));
          } else {
            value = mul_add(value, scale, Vec<A>::load_first(sum, width));
          }
          const auto put = [&](auto* to) { width == kLanes ? value.store(to) : value.store_first(to, width); };
          if (last) {
            put(dq + row * args_.dq.seq_stride + panel * kLanes);
          } else {
            put(sum);
          }
        });
  }

  void write(const HeadTensor<T>& tensor, int64_t head_k, const A* from, int64_t panels, int64_t columns, A scale) {
    const Vec<A> factor = Vec<A>::broadcast(scale);
    for (int64_t key = key_begin_; key < key_end_; ++key, from += panels * kLanes) {
      T* to = tensor.key(sample_, head_k, key);
      for (int64_t column = 0; column < columns; column += kLanes) {
        const Vec<A> value = Vec<A>::load(from + column) * factor;
        if (column + kLanes <= columns) {
          value.store(to + column);
        } else {
          value.store_first(to + column, columns - column);
        }
      }
    }
  }

  static constexpr int64_t kBlockPanel = kBlockRows / kDepth * kLanes;

  const Shared<T>& shared_;
  const AttentionBackward<T>& args_;
  const AttentionSizes& sizes_;
  const Scores<T>& scores_;
  std::byte* const base_;
  Scratch<E> scratch_;
  Plan plan_;
  Sample sample_;
  AttentionWindow window_;
  int64_t first_block_, chunk_, key_begin_, key_end_;
};

// dsinks out of the parts of every block of queries, added up in their order.
template <typename T>
void sum_sinks(const Shared<T>& shared, const Segments<Plan>& segments) {
  const int64_t heads = shared.args.options.sizes.num_heads;
  for (int64_t head = 0; head < heads; ++head) {
    double sum = 0;
    for (const Segment<Plan>& segment : segments) {
      const int64_t blocks = segment.plan.query_blocks;
      for (int64_t sample = 0; sample < segment.samples; ++sample) {
        const Accumulate<T>* parts = shared.sink_parts + segment.first_block + (sample * heads + head) * blocks;
        sum = std::accumulate(parts, parts + blocks, sum);
      }
    }
    shared.args.dsinks[head] = static_cast<Accumulate<T>>(sum);
  }
}

template <typename T, typename E>
void backward(const AttentionBackward<T>& args) {
  using A = Accumulate<T>;
  const AttentionSizes& s = args.options.sizes;
  const Segments<Plan> segments(args.options,
                                [&](const AttentionSizes& sizes) { return Plan::make<A>(args.options, sizes); });
  args.dq.advise(s.batch, s.num_heads, s.seqlen_q, s.head_dim);
  args.dk.advise(s.batch, s.num_heads_k, s.seqlen_k, s.head_dim);
  args.dv.advise(s.batch, s.num_heads_k, s.seqlen_k, s.head_dim_v);
  const int64_t most = std::max<int64_t>({segments.tasks(), segments.blocks(), 1});
  const int threads = static_cast<int>(std::min<int64_t>(std::max(args.options.num_threads, 1), most));
  int64_t scratch_bytes = 0, chunks = 0, query_blocks = 0, task_keys = 0, panels = 0;
  for (const Segment<Plan>& segment : segments) {
    scratch_bytes = std::max(scratch_bytes, Scratch<E>(nullptr, s, segment.plan).bytes);
    chunks = std::max(chunks, segment.plan.chunks);
    query_blocks = std::max(query_blocks, segment.plan.query_blocks);
    task_keys = segment.plan.task_keys;
    panels = segment.plan.panels;
  }
  const Buffer<std::byte> memory = allocate<std::byte>(threads * scratch_bytes);
  const Buffer<A> delta = allocate<A>(s.rows()), sink_parts = allocate<A>(segments.blocks());
  const bool sums_dq = !std::is_same_v<T, A> && chunks > 1;
  const int64_t dq_size = sums_dq ? s.rows() * panels * Vec<A>::kSize : 0;
  const Buffer<A> dq = allocate<A>(dq_size);
  advise_huge_pages(dq.get(), dq_size * static_cast<int64_t>(sizeof(A)));
  std::vector<Turn> turns(segments.blocks());
  const Scores<T> scores(args.options, args.terms);
  BiasGradient<A> bias_gradient(args.dbias, args.dbias_size, s, task_keys, kBlockRows, chunks, query_blocks, threads);
  const Shared<T> shared{args, scores, bias_gradient, delta.get(), dq.get(), sink_parts.get(), turns.data()};
  std::atomic<int64_t> next_task{0};

#pragma omp parallel num_threads(threads)
  {
    bias_gradient.zero();
#pragma omp for schedule(static)
    for (int64_t index = 0; index < segments.blocks(); ++index) {
      const Segment<Plan>& segment = segments.of_block(index);
      const int64_t local = index - segment.first_block, pair = local / segment.plan.query_blocks;
      prepare_block(shared, args.options.sample(segment.first_sample + pair / s.num_heads), pair % s.num_heads,
                    local % segment.plan.query_blocks * kBlockRows, index);
    }
    // Not an OpenMP loop: the order in which tasks begin must be the order of their turns.
    BackwardTask<T, E> task(shared, memory.get() + omp_get_thread_num() * scratch_bytes);
    for (int64_t index = next_task++; index < segments.tasks(); index = next_task++) {
      const Segment<Plan>& segment = segments.of_task(index);
      const Plan& plan = segment.plan;
      const int64_t local = index - segment.first_task, pairs = segment.samples * s.num_heads_k;
      const int64_t sample = local % pairs / s.num_heads_k;
      task.run(plan, args.options.sample(segment.first_sample + sample), segment.first_block + sample * plan.blocks,
               local % s.num_heads_k, plan.chunk_in_order(local / pairs));
    }
  }
  if (scores.has_sinks()) sum_sinks(shared, segments);
}

}  // namespace

template <typename T>
void attention_backward(const AttentionBackward<T>& args) {
  dispatch_operand<T>([&](auto tag) { backward<T, typename decltype(tag)::Type>(args); });
}

template void attention_backward<float>(const AttentionBackward<float>&);
template void attention_backward<double>(const AttentionBackward<double>&);
template void attention_backward<BFloat16>(const AttentionBackward<BFloat16>&);
template void attention_backward<Float16>(const AttentionBackward<Float16>&);

}  // namespace leedl
