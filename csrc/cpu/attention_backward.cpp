// Attention, backward: one task owns the keys [key_begin, key_end) of one key head, with their dk and dv.
//
// With P = exp(scale * Q . K^T - lse), delta = rowsum(dout * out) and dS = P * (dout . V^T - delta + dlse):
//     dv = P^T . dout,   dk = scale * dS^T . Q,   dq = scale * dS . K
// (FlashAttention, Dao et al. 2022, appendix B.4; leedl_fast/reference/attention.py has the whole of it).
// A task walks over the blocks of queries that see its keys, for each query head of the group. A block's dq receives
// terms from several tasks, each of which adds its own to dq itself, in an order that the sizes of the problem fix: a
// counter per block tells whose turn it is. Tasks begin in that same order, so the one that is waited for is always
// running. The gradient of a bias that samples or heads share is added up in turns too.
#include "attention_backward_products.h"
#include "attention_delta.h"

namespace leedl {
namespace {

template <typename T, typename E, bool kAmx>
class BackwardTask {
 public:
  BackwardTask(const BackwardShared<T>& shared, std::byte* base)
      : shared_(shared),
        args_(shared.args),
        sizes_(shared.args.options.sizes),
        scores_(shared.scores),
        base_(base),
        scratch_(nullptr, sizes_, BackwardPlan{}),
        products_(scratch_, sizes_, plan_),
        plain_(scores_.softmax() && !scores_.drops() && !scores_.capped()) {
    statistics_.factor = scores_.scale().factor;
    statistics_.kept = scores_.kept();
  }

  // first_block: of the sample, in shared.turns.
  void run(const BackwardPlan& plan, const Sample& sample, int64_t first_block, int64_t head_k, int64_t chunk) {
    plan_ = plan;
    scratch_ = Scratch(base_, sizes_, plan);
    const TileRegisters registers(kAmx);
    sample_ = sample;
    window_ = sample.window;
    first_block_ = first_block;
    chunk_ = chunk;
    key_begin_ = chunk * plan_.task_keys;
    key_end_ = std::min(key_begin_ + plan_.task_keys, sample.seqlen_k);
    visible_end_ = std::min(key_end_, window_.key_end);
    products_.begin(key_end_ - key_begin_, visible_end_ - key_begin_, keys(args_.k, head_k), keys(args_.v, head_k));
    const int64_t first_head = head_k * sizes_.group(), end_head = first_head + sizes_.group();
    BiasTask bias_task(shared_.bias_gradient, omp_get_thread_num(), sample.batch, first_head, chunk,
                       key_end_ - key_begin_);
    if (key_begin_ < visible_end_) {
      const int64_t first_row = round_down(window_.query_begin(key_begin_), kBlockRows<E>);
      const int64_t last_row = window_.query_end_of(visible_end_ - 1);
      for (int64_t row = first_row; row < last_row; row += kBlockRows<E>) {
        for (int64_t head = first_head; head < end_head; ++head) block(head, row, bias_task);
      }
    }
    bias_task.finish();
    products_.write(key_end_ - key_begin_, args_.dk.key(sample_, head_k, key_begin_), args_.dk.seq_stride,
                    static_cast<A>(args_.options.softmax_scale), args_.dv.key(sample_, head_k, key_begin_),
                    args_.dv.seq_stride, scores_.kept());
  }

 private:
  using A = Accumulate<T>;
  using Scratch = BackwardScratch<E, kAmx>;
  using Products = BackwardProducts<E, kAmx>;
  using BiasTask = typename BiasGradient<A>::Task;
  static constexpr int64_t kLanes = Vec<A>::kSize;
  static constexpr int64_t kDepth = Operand<E>::kDepth;
  static constexpr int64_t kKeyUnit = Products::kKeyUnit;
  static_assert(kBlockRows<E> % kStripRows == 0 && kStripRows % kDepth == 0);

  // The keys of this task that a strip of queries sees, counted from key_begin_.
  struct Strip {
    int64_t row, rows;
    int64_t begin, end;
  };

  // Scores of a strip, from the key key_begin_ + begin on.
  struct Part {
    int64_t row, rows;
    int64_t local_row;  // in the block
    int64_t begin;
    A *p, *ds;
  };

  MatrixRows<T> keys(const HeadTensor<const T>& tensor, int64_t head_k) const {
    return {tensor.key(sample_, head_k, key_begin_), tensor.seq_stride};
  }
  MatrixRows<T> queries(const HeadTensor<const T>& tensor, int64_t head, int64_t row) const {
    return {tensor.query(sample_, head, row), tensor.seq_stride};
  }

  Strip strip(int64_t row) const {
    const int64_t rows = std::min(kStripRows, window_.seqlen_q - row);
    return {row, rows, std::max(window_.key_begin(row) - key_begin_, int64_t{0}),
            std::min(window_.key_end_of(row + rows - 1), key_end_) - key_begin_};
  }

  // One block of queries: scores, then everything that is made of them.
  void block(int64_t head, int64_t row_begin, BiasTask& bias_task) {
    const int64_t row_end = std::min(row_begin + kBlockRows<E>, window_.seqlen_q);
    const int64_t seen_begin = window_.key_begin(row_begin), seen_end = window_.key_end_of(row_end - 1);
    if (std::max(seen_begin, key_begin_) >= std::min(seen_end, key_end_)) return;

    products_.pack_block(row_end - row_begin, queries(args_.q, head, row_begin), queries(args_.dout, head, row_begin));
    bias_task.begin_block(head, row_begin);
    for (int64_t row = row_begin; row < row_end; row += kStripRows) {
      const Strip seen = strip(row);
      if (seen.begin < seen.end) gradients(head, seen, row - row_begin, bias_task);
    }
    bias_task.end_block();
    if constexpr (kAmx) clear_unseen(row_begin, row_end, seen_begin, seen_end);
    products_.add_columns(0, visible_end_ - key_begin_, [&](int64_t key, int64_t last_key) {
      return std::pair(std::max(window_.query_begin(key_begin_ + key), row_begin) - row_begin,
                       std::min(window_.query_end_of(key_begin_ + last_key), row_end) - row_begin);
    });

    Turn& turn = shared_.turns[first_block_ + head * plan_.query_blocks + row_begin / kBlockRows<E>];
    turn.wait_for(plan_.rank(chunk_, seen_begin, seen_end));
    for (int64_t row = row_begin; row < row_end; row += kStripRows) {
      const Strip seen = strip(row);
      if (seen.begin < seen.end) add_rows(head, seen, scratch_.dq + (row - row_begin) * plan_.panels * kLanes);
    }
    turn.pass_on();
  }

  // Makes P and dS of a block zeros where its strips have none, for the keys that one of its queries sees.
  void clear_unseen(int64_t row_begin, int64_t row_end, int64_t seen_begin, int64_t seen_end) {
    const int64_t begin = round_down(std::max(seen_begin - key_begin_, int64_t{0}), kKeyUnit);
    const int64_t end = round_up(std::min(seen_end, key_end_) - key_begin_, kKeyUnit);
    for (int64_t row = 0; row < round_up(row_end - row_begin, Products::kColumnRows); row += kDepth) {
      int64_t first = end, last = end;
      if (row_begin + row < row_end) {
        const Strip seen = strip(row_begin + round_down(row, kStripRows));
        if (seen.begin < seen.end) {
          first = round_down(seen.begin, kKeyUnit);
          last = round_up(seen.end, kKeyUnit);
        }
      }
      for (E* operand : {scratch_.p, scratch_.ds}) {
        E* columns = operand + row / kDepth * kScorePitch;
        std::fill(columns + begin, columns + first, E{});
        std::fill(columns + last, columns + end, E{});
      }
    }
  }

  // P, dS and dS . K of one strip. P and dS are zeros where a row does not see a key.
  void gradients(int64_t head, const Strip& strip, int64_t local_row, BiasTask& bias_task) {
    const int64_t begin = round_down(strip.begin, kKeyUnit);
    const int64_t columns = round_up(strip.end, kLanes) - begin, cleared = round_up(strip.end, kKeyUnit) - begin;
    A *p, *ds;
    if constexpr (Scratch::kInPlace) {
      p = scratch_.p + local_row * kScorePitch + begin;
      ds = scratch_.ds + local_row * kScorePitch + begin;
    } else {
      p = scratch_.strip_p;
      ds = scratch_.strip_ds;
    }
    const StripColumns whole{strip.rows, begin, begin + cleared};
    products_.multiply_strip({strip.rows, begin, strip.end}, queries(args_.q, head, strip.row), scores_.scale().sign, p,
                             queries(args_.dout, head, strip.row), scores_.gradient_runs(), ds);

    read_statistics(head, strip);
    for (int64_t r = 0; r < strip.rows; ++r) prefetch_row(head, strip.row + r);
    const Part part{strip.row, strip.rows, local_row, begin, p, ds};
    if (Scratch::kInPlace || !plain_ || bias_task.wanted()) {
      row_gradients(head, part, 0, columns, cleared, bias_task);
    } else if constexpr (!Scratch::kInPlace) {
      // Most columns are seen by all of the rows: their numbers go straight to pairs.
      const int64_t last_row = strip.row + strip.rows - 1, origin = key_begin_ + begin;
      const int64_t left = std::clamp(round_up(window_.key_begin(last_row) - origin, kLanes), int64_t{0}, columns);
      const int64_t right = std::clamp(round_down(window_.key_end_of(strip.row) - origin, kLanes), left, columns);
      row_gradients(head, part, 0, left, left, bias_task);
      pair_gradients(head, part, left, right);
      row_gradients(head, part, right, columns, cleared, bias_task);
    }
    const E* ds_rows;
    if constexpr (Scratch::kInPlace) {
      ds_rows = ds;
    } else {
      ds_rows = scratch_.ds_rows;
    }
    const auto keys_of = [&](int64_t first_row, int64_t last_row) {
      return std::pair(std::max(window_.key_begin(strip.row + first_row) - key_begin_, int64_t{0}),
                       std::min(window_.key_end_of(strip.row + last_row), key_end_) - key_begin_);
    };
    products_.multiply_rows(whole, ds_rows, keys_of, scratch_.dq + local_row * plan_.panels * kLanes);
  }

  void read_statistics(int64_t head, const Strip& strip) {
    if (!scores_.softmax()) return;
    const int64_t offset = args_.options.statistics_index(sample_, head, strip.row);
    const auto read = [&](A* to, const A* from, A otherwise) {
      const int64_t count = from == nullptr ? 0 : strip.rows;
      std::copy_n(from + offset, count, to);
      std::fill_n(to + count, kStripRows - count, otherwise);
    };
    read(statistics_.row_max, args_.row_max, A(0));
    read(statistics_.row_sum, args_.row_sum, std::numeric_limits<A>::infinity());
    read(statistics_.delta, shared_.delta, A(0));
    read(statistics_.dlse, args_.dlse, A(0));
  }

  // A little of what is needed soon, row by row: the sums of this query, and the queries of the next block.
  void prefetch_row(int64_t head, int64_t row) const {
    const auto prefetch = [](const auto* from, int64_t count) {
      for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof *from)) __builtin_prefetch(from + i, 0, 2);
    };
    if constexpr (std::is_same_v<T, A>) {
      prefetch(args_.dq.query(sample_, head, row), sizes_.head_dim);
    } else if (plan_.chunks > 1) {
      const int64_t stride = plan_.panels * kLanes;
      prefetch(shared_.dq + args_.options.statistics_index(sample_, head, row) * stride, stride);
    }
    const int64_t next = row + kBlockRows<E>;
    if (next >= window_.seqlen_q) return;
    prefetch(args_.q.query(sample_, head, next), sizes_.head_dim);
    prefetch(args_.dout.query(sample_, head, next), sizes_.head_dim_v);
  }

  // P and dS of the columns [from, to) of a strip; columns up to `cleared`, a multiple of W, become zeros.
  void row_gradients(int64_t head, const Part& part, int64_t from, int64_t to, int64_t cleared, BiasTask& bias_task) {
    const int64_t columns = to - from, origin = key_begin_ + part.begin + from;
    if (from == cleared) return;
    for (int64_t r = 0; r < part.rows; ++r) {
      A *p = part.p + r * kScorePitch + from, *ds = part.ds + r * kScorePitch + from;
      const int64_t row = part.row + r;
      if (scores_.modified()) scores_.modify(sample_, head, row, origin, columns, p, scratch_.slopes);
      if (scores_.drops()) {
        scores_.dropout_factors(sample_, head, row, origin, columns, scratch_.factors);
        multiply_row(ds, scratch_.factors, columns);
      }
      if (scores_.softmax()) {
        score_gradients(statistics_, r, columns, p, ds);
      } else {
        scores_.activate_backward(p, ds, columns);
      }
      if (scores_.drops()) multiply_row(p, scratch_.factors, columns);
      const int64_t first = window_.key_begin(row) - origin, last = window_.key_end_of(row) - origin;
      mask_row(p, 0, cleared - from, first, last, A(0));
      mask_row(ds, 0, cleared - from, first, last, A(0));
      bias_task.add(row, part.begin + from, std::min(columns, key_end_ - origin), ds);
      if (scores_.capped()) multiply_row(ds, scratch_.slopes, columns);
    }
    if constexpr (!Scratch::kInPlace) pack(part, from, cleared - from);
  }

  // The same as pairs.
  void pack(const Part& part, int64_t from, int64_t columns) {
    if (part.rows % 2 != 0) {
      std::fill_n(part.p + part.rows * kScorePitch + from, columns, A(0));
      std::fill_n(part.ds + part.rows * kScorePitch + from, columns, A(0));
    }
    for (int64_t r = 0; r < part.rows; r += 2) {
      const int64_t to = (part.local_row + r) / 2 * kScorePitch + part.begin + from;
      const A *p = part.p + r * kScorePitch + from, *ds = part.ds + r * kScorePitch + from;
      pack_columns(scratch_.p + to, p, p + kScorePitch, columns);
      pack_columns(scratch_.ds + to, ds, ds + kScorePitch, columns);
      pack_row(scratch_.ds_rows + r * kScorePitch + from / 2, ds, columns);
      pack_row(scratch_.ds_rows + (r + 1) * kScorePitch + from / 2, ds + kScorePitch, columns);
    }
  }

  // The columns [from, to) that all rows see, where nothing happens to P and dS after score_gradients.
  void pair_gradients(int64_t head, const Part& part, int64_t from, int64_t to) {
    if (from == to) return;
    for (int64_t r = 0; r < part.rows; r += 2) {
      A *scores = part.p + r * kScorePitch + from, *ds = part.ds + r * kScorePitch + from;
      if (scores_.modified()) {
        for (int64_t i = r; i < std::min(r + 2, part.rows); ++i) {
          scores_.modify(sample_, head, part.row + i, key_begin_ + part.begin + from, to - from,
                         scores + (i - r) * kScorePitch, nullptr);
        }
      }
      const int64_t pairs = (part.local_row + r) / 2 * kScorePitch + part.begin + from;
      score_gradients(statistics_, r, to - from, scores, ds, scratch_.p + pairs, scratch_.ds + pairs,
                      scratch_.ds_rows + r * kScorePitch + from / 2);
    }
  }

  // dq += scale * dS . K for one strip. The first chunk that the strip sees begins the sum, the last one rounds it.
  void add_rows(int64_t head, const Strip& strip, const A* from) {
    const int64_t seen_begin = window_.key_begin(strip.row), seen_end = window_.key_end_of(strip.row + strip.rows - 1);
    const int64_t rank = plan_.rank(chunk_, seen_begin, seen_end);
    const bool first = rank == 0;
    const bool last = rank == (seen_end - 1) / plan_.task_keys - seen_begin / plan_.task_keys;
    const A scale = static_cast<A>(args_.options.softmax_scale);
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
    const auto add = [&](auto* to, int64_t to_stride) {
      add_scaled(strip.rows, sizes_.head_dim, from, plan_.panels, scale, first ? nullptr : sums, stride, to, to_stride);
    };
    if (last) {
      add(dq, args_.dq.seq_stride);
    } else {
      add(sums, stride);
    }
  }

  const BackwardShared<T>& shared_;
  const AttentionBackward<T>& args_;
  const AttentionSizes& sizes_;
  const Scores<T>& scores_;
  std::byte* const base_;
  Scratch scratch_;
  const Products products_;
  RowStatistics<A> statistics_;
  const bool plain_;  // nothing happens to P and dS after score_gradients, but a bias may want dS
  BackwardPlan plan_;
  Sample sample_;
  AttentionWindow window_;
  int64_t first_block_, chunk_, key_begin_, key_end_;
  int64_t visible_end_;  // of the chunk's keys: the rest is padding
};

template <typename T, typename E, bool kAmx>
void backward(const AttentionBackward<T>& args) {
  using A = Accumulate<T>;
  const AttentionSizes& s = args.options.sizes;
  const Segments<BackwardPlan> segments(args.options,
                                [&](const AttentionSizes& sizes) { return BackwardPlan::make<E>(args.options, sizes); });
  args.dq.advise(s.batch, s.num_heads, s.seqlen_q, s.head_dim);
  args.dk.advise(s.batch, s.num_heads_k, s.seqlen_k, s.head_dim);
  args.dv.advise(s.batch, s.num_heads_k, s.seqlen_k, s.head_dim_v);
  const int64_t most = std::max<int64_t>({segments.tasks(), segments.blocks(), 1});
  const int threads = static_cast<int>(std::min<int64_t>(std::max(args.options.num_threads, 1), most));
  int64_t scratch_bytes = 0, chunks = 0, query_blocks = 0, task_keys = 0, panels = 0;
  for (const Segment<BackwardPlan>& segment : segments) {
    scratch_bytes = std::max(scratch_bytes, BackwardScratch<E, kAmx>(nullptr, s, segment.plan).bytes);
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
  BiasGradient<A> bias_gradient(args.dbias, args.dbias_size, s, task_keys, kBlockRows<E>, chunks, query_blocks, threads);
  const BackwardShared<T> shared{args, scores, bias_gradient, delta.get(), dq.get(), sink_parts.get(), turns.data()};
  std::atomic<int64_t> next_task{0};

#pragma omp parallel num_threads(threads)
  {
    bias_gradient.zero();
#pragma omp for schedule(static)
    for (int64_t index = 0; index < segments.blocks(); ++index) {
      const Segment<BackwardPlan>& segment = segments.of_block(index);
      const int64_t local = index - segment.first_block, pair = local / segment.plan.query_blocks;
      const Sample sample = args.options.sample(segment.first_sample + pair / s.num_heads);
      const int64_t row = local % segment.plan.query_blocks * kBlockRows<E>;
      prepare_block(shared, sample, pair % s.num_heads, row, std::min(row + kBlockRows<E>, sample.window.seqlen_q),
                    index);
    }
    // Not an OpenMP loop: the order in which tasks begin must be the order of their turns.
    BackwardTask<T, E, kAmx> task(shared, memory.get() + omp_get_thread_num() * scratch_bytes);
    for (int64_t index = next_task++; index < segments.tasks(); index = next_task++) {
      const Segment<BackwardPlan>& segment = segments.of_task(index);
      const BackwardPlan& plan = segment.plan;
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
  dispatch_products<T>([&](auto tag, auto amx) { backward<T, typename decltype(tag)::Type, amx()>(args); });
}

template void attention_backward<float>(const AttentionBackward<float>&);
template void attention_backward<double>(const AttentionBackward<double>&);
template void attention_backward<BFloat16>(const AttentionBackward<BFloat16>&);
template void attention_backward<Float16>(const AttentionBackward<Float16>&);

}  // namespace leedl
