// Attention, forward: one task owns the query rows [row_begin, row_end) of the query heads that share one key head.
//
// A task walks over blocks of keys. It packs a block's keys (transposed) and values once; then every strip of queries
// computes its scores S = Q . K^T against the keys that it sees, updates its running maximum and sum, and adds
// P . V to its output (online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022, algorithm 1).
// Where a strip sees few keys one block holds them all, nothing is ever rescaled, and the block moves on with the
// strips. Strips begin at multiples of their rows and blocks at positions that depend on the sizes of the problem
// alone, so how rows are divided into tasks changes no result.
//
// On AMX a strip has twice the rows, two tiles, and both products go along the depth in whole tiles, over zeros where
// there is no more; between the products nothing differs.
#include "attention_output.h"
#include "attention_softmax.h"

namespace leedl {
namespace {

constexpr int64_t kMaxColumns = 560;  // of one strip's scores
constexpr int64_t kPackedBytes = 256 * 1024;  // of keys and values in one block: they stay in the second-level cache
constexpr int64_t kPackedTogether = 64;       // keys, where the block moves on
constexpr int64_t kSinglePassRows = 4032;     // rows of a task, where one block holds all that it sees
constexpr int64_t kBlockRows = 1008;    // rows of a task, over all heads of the group, where it walks over many blocks
constexpr int64_t kTasksPerThread = 8;  // smaller tasks rather than fewer than this
constexpr int64_t kAmxBlockKeys = 256;             // so that scores of twice the rows take no more of the cache
constexpr int64_t kAmxStepKeys = 2 * kTileSize;    // of a step of P . V
static_assert(kMaxColumns <= kScorePitch);

template <bool kAmx>
constexpr int64_t kStripRowsOn = kAmx ? 2 * kStripRows : kStripRows;

// How a problem is cut into tasks and blocks.
struct Plan {
  int64_t depth;        // elements of a packed key
  int64_t value_depth;  // elements of a column of packed values
  bool single_pass;
  int64_t task_rows, chunks;
  int64_t tasks, blocks;  // of one sample: num_heads_k * chunks, and none
  int64_t block_keys;     // keys that one block holds at most
  int64_t panels_v;       // vector panels of a row of values

  template <typename E, bool kAmx>
  static Plan make(const AttentionOptions& options, const AttentionSizes& s) {
    const int64_t threads = std::max(options.num_threads, 1);
    constexpr int64_t kLanes = Vec<SumOf<E>>::kSize, kRows = kStripRowsOn<kAmx>;
    Plan plan;
    plan.depth = kAmx ? round_up(depth_of<E>(s.head_dim), kTileSize) : depth_of<E>(s.head_dim);
    plan.panels_v = (s.head_dim_v + kLanes - 1) / kLanes;
    const int64_t span = options.window_left + options.window_right;
    const int64_t strip_columns = std::min(kRows + span + 2 * kLanes, s.seqlen_k + kLanes);
    plan.single_pass = strip_columns <= kMaxColumns;

    const int64_t strips = (s.seqlen_q + kRows - 1) / kRows;
    const int64_t max_strips =
        std::max<int64_t>((plan.single_pass ? kSinglePassRows : kBlockRows / s.group()) / kRows, 1);
    const int64_t wanted_strips = std::max<int64_t>(strips * s.batch * s.num_heads_k / (kTasksPerThread * threads),
                                                    4 * kStripRows / kRows);
    const int64_t task_strips = std::min({wanted_strips, max_strips, std::max<int64_t>(strips, 1)});
    plan.task_rows = task_strips * kRows;
    plan.chunks = (strips + task_strips - 1) / task_strips;
    plan.tasks = s.num_heads_k * plan.chunks;
    plan.blocks = 0;

    const int64_t bytes = static_cast<int64_t>(sizeof(E)) * (s.head_dim + plan.panels_v * kLanes);
    const int64_t fitting = kPackedBytes * Operand<E>::kDepth / bytes;
    if (plan.single_pass) {
      const int64_t seen = std::min(plan.task_rows + span + kLanes, s.seqlen_k);
      plan.block_keys = round_up(std::min(seen, std::max(2 * fitting, strip_columns + 2 * kPackedTogether)), kLanes);
    } else {
      plan.block_keys = round_down(std::clamp<int64_t>(fitting, 128, kAmx ? kAmxBlockKeys : 512), 64);
    }
    plan.value_depth = depth_of<E>(plan.block_keys + (kAmx ? kAmxStepKeys / 2 : 0));
    return plan;
  }
};

// The memory of one thread. E is what operands hold, A what is summed; see Operand.
template <typename E, bool kAmx>
struct Scratch {
  using A = SumOf<E>;
  static constexpr int64_t kRows = kStripRowsOn<kAmx>;  // of a strip

  E* keys;           // [block_keys / W] panels of [plan.depth][W]
  E* values;         // [panels_v] panels of [value_depth][W]
  E* queries;        // [kRows][kHeadPitch]
  A* scores;         // [kRows][kScorePitch]
  E* probabilities;  // the same; the scores themselves where E is A
  A* out;            // per strip [kRows][panels_v * W], not yet divided by the sum
  A* row_max;        // per strip [kRows]
  A* row_sum;        // per strip [kRows]
  A* factors;        // of dropout [kScorePitch]
  int64_t bytes;

  Scratch(std::byte* base, const AttentionSizes& s, const Plan& plan) {
    constexpr int64_t kLanes = Vec<A>::kSize;
    const int64_t rows = plan.single_pass ? kRows : s.group() * plan.task_rows;
    ByteArena arena(base);
    arena.take(keys, plan.block_keys * plan.depth);
    arena.take(values, plan.value_depth * plan.panels_v * kLanes);
    arena.take(queries, kRows * kHeadPitch);
    arena.take(scores, kRows * kScorePitch);
    if constexpr (std::is_same_v<E, A>) {
      probabilities = scores;
    } else {
      arena.take(probabilities, kRows * kScorePitch);
    }
    arena.take(out, rows * plan.panels_v * kLanes);
    arena.take(row_max, rows);
    arena.take(row_sum, rows);
    arena.take(factors, kScorePitch);
    bytes = arena.taken();
  }
};

template <typename T, typename E, bool kAmx>
class ForwardTask {
 public:
  ForwardTask(const AttentionForward<T>& args, std::byte* base)
      : args_(args),
        sizes_(args.options.sizes),
        scores_(args.options, args.terms),
        writer_(args, scores_),
        base_(base),
        scratch_(nullptr, sizes_, Plan{}) {}

  // Task `index` of the sample whose problem is cut by `plan`. The last rows first: with a causal window they are the
  // longest tasks.
  void run(const Plan& plan, const Sample& sample, int64_t index) {
    plan_ = plan;
    scratch_ = Scratch<E, kAmx>(base_, sizes_, plan);
    const TileRegisters registers(kAmx);
    if (plan.depth > depth_of<E>(sizes_.head_dim)) std::fill_n(scratch_.queries, kRows * kHeadPitch, E{});
    sample_ = sample;
    window_ = sample.window;
    const int64_t row_begin = (plan.chunks - 1 - index / sizes_.num_heads_k) * plan.task_rows;
    const int64_t row_end = std::min(row_begin + plan.task_rows, window_.seqlen_q);
    const int64_t head_k = index % sizes_.num_heads_k;
    const int64_t key_begin = window_.key_begin(row_begin);
    const int64_t key_end = window_.key_end_of(row_end - 1);
    const int64_t first_head = head_k * sizes_.group();
    for (int64_t head = first_head; head < first_head + sizes_.group(); ++head) {
      for (int64_t row = row_begin; row < row_end; row += kRows) {
        if (window_.key_begin(row) < window_.key_end_of(last_row(row))) continue;
        for (int64_t r = row; r <= last_row(row); ++r) writer_.write_masked(sample_, head, r);
      }
    }
    if (plan_.single_pass) {
      block_begin_ = packed_end_ = round_down(key_begin, kLanes);
      for (int64_t row = row_begin; row < row_end; row += kRows) {
        hold(head_k, window_.key_begin(row), window_.key_end_of(last_row(row)), key_end);
        for (int64_t head = first_head; head < first_head + sizes_.group(); ++head) strip(head, row, 0);
      }
      return;
    }
    for (int64_t begin = round_down(key_begin, plan_.block_keys); begin < key_end; begin += plan_.block_keys) {
      block_begin_ = packed_end_ = begin;
      pack(head_k, std::min(begin + plan_.block_keys, key_end));
      for (int64_t head = first_head; head < first_head + sizes_.group(); ++head) {
        for (int64_t row = row_begin; row < row_end; row += kRows) {
          strip(head, row, ((head - first_head) * plan_.task_rows + row - row_begin) / kRows);
        }
      }
    }
  }

 private:
  using A = Accumulate<T>;
  static constexpr int64_t kRows = kStripRowsOn<kAmx>;  // of a strip
  static constexpr int64_t kLanes = Vec<A>::kSize;
  static constexpr int64_t kDepth = Operand<E>::kDepth;

  int64_t last_row(int64_t row) const { return std::min(row + kRows, window_.seqlen_q) - 1; }
  int64_t panel_stride() const { return plan_.value_depth * kLanes; }

  // Packs the keys from packed_end_, a multiple of the lanes beyond block_begin_, to `end`.
  void pack(int64_t head_k, int64_t end) {
    const int64_t at = packed_end_ - block_begin_, keys = end - packed_end_;
    const T* k = args_.k.key(sample_, head_k, packed_end_);
    if constexpr (kAmx) {
      pack_transposed(scratch_.keys + at * plan_.depth, k, args_.k.seq_stride, keys, sizes_.head_dim, plan_.depth);
    } else {
      pack_transposed(scratch_.keys + at * plan_.depth, k, args_.k.seq_stride, keys, sizes_.head_dim);
    }
    pack_panels(scratch_.values + at / kDepth * kLanes, panel_stride(), args_.v.key(sample_, head_k, packed_end_),
                args_.v.seq_stride, keys, sizes_.head_dim_v);
    packed_end_ = end;
    if constexpr (!kAmx) return;
    // Products may go on for less than kAmxStepKeys beyond the last panel of keys.
    const int64_t first = depth_of<E>(end - block_begin_);
    const int64_t last = depth_of<E>(round_up(end - block_begin_, kLanes) + kAmxStepKeys - kLanes);
    for (int64_t panel = 0; panel < plan_.panels_v; ++panel) {
      std::fill_n(scratch_.values + panel * panel_stride() + first * kLanes, (last - first) * kLanes, E{});
    }
  }

  // Moves the block on to hold the keys [begin, end) of a strip; the task sees none from key_end on.
  void hold(int64_t head_k, int64_t begin, int64_t end, int64_t key_end) {
    if (end <= packed_end_) return;
    if (end - block_begin_ > plan_.block_keys) {
      const int64_t from = round_down(begin, kLanes) - block_begin_;
      const int64_t kept = packed_end_ - block_begin_ - from;
      std::memmove(scratch_.keys, scratch_.keys + from * plan_.depth, kept * plan_.depth * sizeof(E));
      for (int64_t panel = 0; panel < plan_.panels_v; ++panel) {
        E* values = scratch_.values + panel * panel_stride();
        std::memmove(values, values + from / kDepth * kLanes, kept / kDepth * kLanes * sizeof(E));
      }
      block_begin_ += from;
    }
    const int64_t together = round_up(end - packed_end_, kPackedTogether);
    pack(head_k, std::min({packed_end_ + together, block_begin_ + plan_.block_keys, key_end}));
  }

  // One strip of queries against the keys of the block that it sees.
  void strip(int64_t head, int64_t row, int64_t local) {
    const int64_t rows = last_row(row) + 1 - row;
    const int64_t strip_begin = window_.key_begin(row);
    const int64_t strip_end = window_.key_end_of(last_row(row));
    const int64_t begin = std::max(strip_begin, block_begin_) - block_begin_;
    const int64_t end = std::min(strip_end, packed_end_) - block_begin_;
    if (begin >= end) return;

    A* row_max = scratch_.row_max + local * kRows;
    A* row_sum = scratch_.row_sum + local * kRows;
    const bool first = strip_begin >= block_begin_;
    const int64_t padded = round_up(rows, kStripRows);
    for (int64_t r = 0; r < padded; r += kStripRows) {
      if (first) scores_.start(head, row_max + r, row_sum + r);
      pack_rows<kStripRows, kHeadPitch>(scratch_.queries + r * kHeadPitch, args_.q.query(sample_, head, row + r),
                                        args_.q.seq_stride, std::min(kStripRows, rows - r), sizes_.head_dim,
                                        scores_.scale().sign);
    }
    // Columns of the scores count from column_begin, a multiple of W, so that a strip uses the same few cache lines
    // always.
    const int64_t column_begin = round_down(begin, kLanes);
    const int64_t columns = round_up(end, kLanes) - column_begin;
    A* scores = scratch_.scores;
    multiply_queries(rows, column_begin, columns);

    const int64_t origin = block_begin_ + column_begin;
    if (scores_.modified()) {
      for (int64_t r = 0; r < rows; ++r) {
        scores_.modify(sample_, head, row + r, origin, columns, scores + r * kScorePitch, nullptr);
      }
    }
    if (window_.key_begin(last_row(row)) > origin || window_.key_end_of(row) < origin + columns) {
      for (int64_t r = 0; r < rows; ++r) {
        mask_row(scores + r * kScorePitch, 0, columns, window_.key_begin(row + r) - origin,
                 window_.key_end_of(row + r) - origin, -std::numeric_limits<A>::infinity());
      }
    }

    alignas(64) A rescale[kRows];
    if (scores_.softmax()) {
      for (int64_t r = 0; r < padded; r += kStripRows) {
        softmax_rows(scores + r * kScorePitch, columns, scores_.scale().factor, row_max + r, row_sum + r,
                     rescale + r);
      }
    } else {
      std::fill_n(rescale, padded, A(1));
      for (int64_t r = 0; r < rows; ++r) scores_.activate(scores + r * kScorePitch, columns);
    }
    if (scores_.drops()) {
      for (int64_t r = 0; r < rows; ++r) {
        scores_.dropout_factors(sample_, head, row + r, origin, columns, scratch_.factors);
        multiply_row(scores + r * kScorePitch, scratch_.factors, columns);
      }
    }
    const int64_t pitch = plan_.panels_v * kLanes;
    A* out = scratch_.out + local * kRows * pitch;
    if (kAmx && !first) {  // before P is packed: tiles wait for stores that are still on their way
      for (int64_t r = 0; r < padded; ++r) scale_row(out + r * pitch, pitch, rescale[r]);
    }
    if constexpr (!std::is_same_v<E, A>) {
      for (int64_t r = 0; r < padded; ++r) {
        pack_row(scratch_.probabilities + r * kScorePitch, scores + r * kScorePitch, columns);
      }
    }
    if constexpr (kAmx) {
      // P is 0, and V finite, where a row does not see a key.
      const AmxPanels values{scratch_.values + column_begin / kDepth * kLanes, panel_stride(), kLanes};
      multiply_on_amx(rows, depth_of<E>(columns), {scratch_.probabilities, kScorePitch}, values, plan_.panels_v, !first,
                      {out, pitch});
    } else {
      for (int64_t half = 0; half < rows; half += kHalfRows) {
        add_values(row + half, half, column_begin, first ? nullptr : rescale + half, out + half * pitch);
      }
    }
    if (strip_end <= packed_end_) write(head, row, rows, local);
  }

  // scores = Q . K^T for the keys [column_begin, column_begin + columns) of the block.
  void multiply_queries(int64_t rows, int64_t column_begin, int64_t columns) {
    const E* keys = scratch_.keys + column_begin * plan_.depth;
    if constexpr (kAmx) {
      multiply_on_amx(rows, plan_.depth, {scratch_.queries, kHeadPitch}, {keys, plan_.depth * kLanes, kLanes},
                      columns / kLanes, false, {scratch_.scores, kScorePitch});
    } else {
      multiply_scores(score_runs(rows), plan_.depth, scratch_.queries, keys, columns / kLanes, scratch_.scores);
    }
  }

  // out = out * rescale + P . V over the keys that kHalfRows rows see, exactly: others may hold NaN.
  void add_values(int64_t row, int64_t half, int64_t column_begin, const A* rescale, A* out) {
    const int64_t last = std::min(row + kHalfRows, window_.seqlen_q) - 1;
    const int64_t begin = std::max(window_.key_begin(row), block_begin_) - block_begin_;
    const int64_t end = std::min(window_.key_end_of(last), packed_end_) - block_begin_;
    const int64_t depth = begin < end ? depth_of<E>(end) - begin / kDepth : 0;
    if (depth == 0 && rescale != nullptr) return;
    multiply_values(depth, scratch_.probabilities + half * kScorePitch + (begin - column_begin) / kDepth,
                    scratch_.values + begin / kDepth * kLanes, panel_stride(), plan_.panels_v, rescale, out);
  }

  void write(int64_t head, int64_t row, int64_t rows, int64_t local) {
    const int64_t pitch = plan_.panels_v * kLanes;
    const A* row_max = scratch_.row_max + local * kRows;
    const A* row_sum = scratch_.row_sum + local * kRows;
    alignas(64) A inverse[kRows], logarithm[kRows];
    for (int64_t r = 0; r < rows; r += kLanes) {
      const Vec<A> sum = Vec<A>::load(row_sum + r);
      (Vec<A>::broadcast(scores_.kept()) / sum).store(inverse + r);
      mul_add(Vec<A>::load(row_max + r), Vec<A>::broadcast(scores_.scale().lse_scale), log(sum)).store(logarithm + r);
    }
    const A* from = scratch_.out + local * kRows * pitch;
    for (int64_t r = 0; r < rows; ++r, from += pitch) {
      if (row_sum[r] == 0) {
        writer_.write_masked(sample_, head, row + r);
      } else {
        writer_.write(sample_, head, row + r, from, inverse[r], logarithm[r], row_max[r], row_sum[r]);
      }
    }
  }

  const AttentionForward<T>& args_;
  const AttentionSizes& sizes_;
  const Scores<T> scores_;
  const RowWriter<T> writer_;
  std::byte* const base_;
  Scratch<E, kAmx> scratch_;
  Plan plan_;
  Sample sample_;
  AttentionWindow window_;
  int64_t block_begin_, packed_end_;  // the keys of the block
};

template <typename T, typename E, bool kAmx>
void forward(const AttentionForward<T>& args) {
  const AttentionSizes& s = args.options.sizes;
  const Segments<Plan> segments(args.options, [&](const AttentionSizes& sizes) {
    return Plan::make<E, kAmx>(args.options, sizes);
  });
  if (segments.tasks() == 0) return;
  args.out.advise(s.batch, s.num_heads, s.seqlen_q, s.head_dim_v);
  const int threads = static_cast<int>(std::min<int64_t>(std::max(args.options.num_threads, 1), segments.tasks()));
  int64_t scratch_bytes = 0;
  for (const Segment<Plan>& segment : segments) {
    scratch_bytes = std::max(scratch_bytes, Scratch<E, kAmx>(nullptr, s, segment.plan).bytes);
  }
  const Buffer<std::byte> memory = allocate<std::byte>(threads * scratch_bytes);

#pragma omp parallel num_threads(threads)
  {
    ForwardTask<T, E, kAmx> task(args, memory.get() + omp_get_thread_num() * scratch_bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < segments.tasks(); ++index) {
      const Segment<Plan>& segment = segments.of_task(index);
      const int64_t local = index - segment.first_task, heads = s.num_heads_k;
      const int64_t chunk = local / (segment.samples * heads), pair = local % (segment.samples * heads);
      task.run(segment.plan, args.options.sample(segment.first_sample + pair / heads), chunk * heads + pair % heads);
    }
  }
}

}  // namespace

template <typename T>
void attention_forward(const AttentionForward<T>& args) {
  if (attention_decodes(args.options)) return attention_decode(args);
  dispatch_products<T>([&](auto tag, auto amx) { forward<T, typename decltype(tag)::Type, amx()>(args); });
}

template void attention_forward<float>(const AttentionForward<float>&);
template void attention_forward<double>(const AttentionForward<double>&);
template void attention_forward<BFloat16>(const AttentionForward<BFloat16>&);
template void attention_forward<Float16>(const AttentionForward<Float16>&);

}  // namespace leedl
