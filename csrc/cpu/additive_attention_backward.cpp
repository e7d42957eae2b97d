// Additive attention, backward: one task owns a block of queries of one head, with their dq.
//
// With y = tanh(q + k) / 2, P the probabilities, dP = dout . V^T, delta = rowsum(P * dP) and dS = P * (dP - delta),
//     dv_j = sum_i P_ij dout_i              dw_c = 2 sum_ij dS_ij y_ijc
//     dq_ic = 4 w_c sum_j u_ijc             dk_jc = 4 w_c sum_i u_ijc          where u = dS (1/4 - y^2)
// (reference/additive_attention.py). A task makes scores and dP against all keys that its queries see, as vectors over
// keys, and with whole rows at hand the softmax and delta again: where a row is nearly one-hot, dP and delta are nearly
// equal, and their difference must not be one of roundings. Then it makes u, as vectors over c. Nothing is summed
// across lanes but a row's sums.
//
// Several tasks add to the dk and dv of a block of keys, in an order that the sizes of the problem fix: a counter per
// block tells whose turn it is. Tasks begin in that same order, so the one that is waited for is always running.
#include <atomic>
#include <thread>
#include <vector>

#include "additive_attention_backward_plan.h"
#include "additive_attention_gradients.h"

namespace leedl {
namespace {

template <typename T>
class Backward {
 public:
  using A = Accumulate<T>;
  using V = Vec<A>;

  explicit Backward(const AdditiveBackward<T>& args)
      : args_(args),
        problem_(args.problem),
        sizes_(args.problem.sizes),
        weights_(args.score_weight, sizes_),
        plan_(problem_),
        dk_(args.dk, sizes_.batch, sizes_.num_heads_k, sizes_.seqlen_k, sizes_.head_dim),
        dv_(args.dv, sizes_.batch, sizes_.num_heads_k, sizes_.seqlen_k, sizes_.head_dim_v),
        packed_(allocate<A>(key_tasks() * plan_.packed_size())),
        bounded_(allocate<bool>(key_tasks())),
        dweights_(allocate<A>(tasks() * plan_.pitch)),
        turns_(key_tasks()) {}

  int64_t scratch_bytes() const { return Scratch(nullptr, plan_).bytes; }
  int64_t key_tasks() const { return sizes_.batch * sizes_.num_heads_k * plan_.key_blocks; }
  int64_t tasks() const { return sizes_.batch * sizes_.num_heads * plan_.query_blocks; }
  const Sums<T>& dk() const { return dk_; }
  const Sums<T>& dv() const { return dv_; }

  // Packs keys and values of one block; `index` counts (batch, head_k, block).
  void pack(int64_t index, std::byte* memory) const {
    const Scratch scratch(memory, plan_);
    const int64_t pair = index / plan_.key_blocks, begin = index % plan_.key_blocks * kAdditiveBlockKeys;
    const int64_t batch = pair / sizes_.num_heads_k, head_k = pair % sizes_.num_heads_k;
    const int64_t keys = std::min(begin + kAdditiveBlockKeys, problem_.window(batch).key_end) - begin;
    if (keys <= 0) return;
    const Packed packed = packed_block(index);
    load_rows(scratch.rows, plan_.pitch_v, args_.v.row(batch, head_k, begin), args_.v.seq_stride, keys,
              sizes_.head_dim_v);
    pack_transposed(packed.values_t, scratch.rows, plan_.pitch_v, keys, sizes_.head_dim_v);
    load_rows(scratch.rows, plan_.pitch, args_.k.row(batch, head_k, begin), args_.k.seq_stride, keys, sizes_.head_dim);
    bounded_[index] = are_bounded(scratch.rows, keys * plan_.pitch);
    if (bounded_[index]) {
      exponentials(scratch.rows, keys * plan_.pitch);
      pack_transposed(packed.keys_t, scratch.rows, plan_.pitch, keys, plan_.pitch);
      pack_panels(packed.keys, plan_.block_keys * kLanes, scratch.rows, plan_.pitch, keys, plan_.pitch);
    }
  }

  // One block of queries; `index` counts (block, batch, head).
  __attribute__((noinline)) void run(int64_t index, std::byte* memory) {
    const int64_t pairs = sizes_.batch * sizes_.num_heads;
    Task task;
    task.batch = index % pairs / sizes_.num_heads;
    task.head = index % pairs % sizes_.num_heads;
    task.block = index / pairs;
    task.row = task.block * plan_.block_rows;
    task.rows = std::min(plan_.block_rows, sizes_.seqlen_q - task.row);
    task.window = problem_.window(task.batch);
    task.seen = {task.window.key_begin(task.row), task.window.key_end_of(task.row + task.rows - 1)};
    A* dweight = dweights(task.batch, task.head, task.block);
    std::fill_n(dweight, plan_.pitch, A(0));
    const Scratch scratch(memory, plan_);
    std::fill_n(scratch.dq, plan_.block_rows * plan_.pitch, A(0));
    if (!task.seen.empty()) {
      load_rows_of(task, scratch);
      for (int64_t r = 0; r < task.rows; r += kTileRows) make_scores(task, r, scratch);
      for (int64_t r = 0; r < task.rows; ++r) score_gradients(task, r, scratch);
      for (int64_t block = task.seen.first_block(); block <= task.seen.last_block(); ++block) {
        add_block(task, block, dweight, scratch);
      }
    }
    for (int64_t r = 0; r < task.rows; ++r) {
      T* to = args_.dq.row(task.batch, task.head, task.row + r);
      for (int64_t c = 0; c < sizes_.head_dim; c += kLanes) {
        store_columns(V::load(scratch.dq + r * plan_.pitch + c) * factor(task.head, c), to + c, sizes_.head_dim - c);
      }
    }
  }

  // dscore_weight of one head: the sums of all samples and query blocks, in their order, in double.
  void sum_dweight(int64_t head) const {
    std::vector<double> sums(plan_.pitch, 0.0);
    for (int64_t batch = 0; batch < sizes_.batch; ++batch) {
      for (int64_t block = 0; block < plan_.query_blocks; ++block) {
        const A* from = dweights(batch, head, block);
        for (int64_t c = 0; c < plan_.pitch; ++c) sums[c] += static_cast<double>(from[c]);
      }
    }
    A* to = args_.dscore_weight + head * sizes_.head_dim;
    for (int64_t c = 0; c < sizes_.head_dim; ++c) to[c] = static_cast<A>(2 * sums[c]);
  }

 private:
  using Packed = PackedBlock<A>;
  using Scratch = AdditiveBackwardScratch<A>;
  static constexpr int64_t kLanes = V::kSize;

  struct Task {
    int64_t batch, head, block, row, rows;
    AttentionWindow window;
    SeenKeys seen;
    QueryRows<A> queries[kMostStrips];  // of each strip
  };
  Packed packed_block(int64_t index) const { return {packed_.get() + index * plan_.packed_size(), plan_}; }
  A* dweights(int64_t batch, int64_t head, int64_t block) const {
    return dweights_.get() + ((batch * sizes_.num_heads + head) * plan_.query_blocks + block) * plan_.pitch;
  }
  int64_t block_index(const Task& task, int64_t block) const {
    return (task.batch * sizes_.num_heads_k + task.head / sizes_.group()) * plan_.key_blocks + block;
  }
  V factor(int64_t head, int64_t c) const { return V::load(weights_.head(head) + c) * V::broadcast(4); }
  // Where the scores of a row of the task and a block of keys lie, in p and in ds.
  int64_t score_offset(const Task& task, int64_t row, int64_t block) const {
    return ((block - task.seen.first_block()) * plan_.block_rows + row) * kAdditivePitch;
  }
  // Rows beyond the last query are zeros, so that dS = 0 meets no NaN there.
  void load_rows_of(Task& task, const Scratch& scratch) const {
    std::fill_n(scratch.plain, plan_.block_rows * plan_.pitch, A(0));
    std::fill_n(scratch.powers, plan_.block_rows * plan_.pitch, A(0));
    const T* q = args_.q.row(task.batch, task.head, task.row);
    for (int64_t r = 0; r < task.rows; r += kTileRows) {
      task.queries[r / kTileRows] =
          load_queries(q + r * args_.q.seq_stride, args_.q.seq_stride, std::min(kTileRows, task.rows - r),
                       sizes_.head_dim, plan_.pitch, scratch.plain + r * plan_.pitch, scratch.powers + r * plan_.pitch);
    }
    load_rows(scratch.dout, plan_.pitch_v, args_.dout.row(task.batch, task.head, task.row), args_.dout.seq_stride,
              task.rows, sizes_.head_dim_v);
    pack_panels(scratch.douts, plan_.block_rows * kLanes, scratch.dout, plan_.pitch_v, task.rows, plan_.pitch_v);
  }

  // Scores and dP of one strip, its first row counted in the task, against all keys that the task sees.
  void make_scores(const Task& task, int64_t r, const Scratch& scratch) const {
    const QueryRows<A>& queries = task.queries[r / kTileRows];
    for (int64_t c = 0; c < sizes_.head_dim_v; ++c) {
      for (int64_t i = 0; i < kTileRows; ++i) {
        scratch.dout_t[c * kTileRows + i] = i < queries.rows ? scratch.dout[(r + i) * plan_.pitch_v + c] : 0;
      }
    }
    for (int64_t block = task.seen.first_block(); block <= task.seen.last_block(); ++block) {
      const int64_t index = block_index(task, block);
      const Packed packed = packed_block(index);
      const int64_t begin = round_down(task.seen.begin_in(block), kLanes);
      const int64_t panels = (round_up(task.seen.end_in(block), kLanes) - begin) / kLanes;
      const int64_t offset = score_offset(task, r, block) + begin;
      A *p = scratch.p + offset, *ds = scratch.ds + offset;
      if (queries.bounded && bounded_[index]) {
        product_scores(queries, weights_.head(task.head), sizes_.head_dim, packed.keys_t + begin * plan_.pitch, panels,
                       p);
      } else {
        const int64_t keys = load_keys(task, block, scratch);
        pack_transposed(scratch.direct, scratch.rows, plan_.pitch, keys, plan_.pitch);
        direct_scores(queries, weights_.head(task.head), sizes_.head_dim, scratch.direct + begin * plan_.pitch, panels,
                      p);
      }
      for (int64_t c = 0; c < sizes_.head_dim_v; c += kValueRun) {
        tile_rows<kTileRows, TileLayout<1, kTileRows>>(
            std::min(kValueRun, sizes_.head_dim_v - c), scratch.dout_t + c * kTileRows,
            packed.values_t + begin * sizes_.head_dim_v + c * kLanes, sizes_.head_dim_v * kLanes, panels,
            [&](int64_t i, int64_t panel, V value) {
              A* to = ds + i * kAdditivePitch + panel * kLanes;
              (c == 0 ? value : V::load(to) + value).store(to);
            });
      }
    }
  }

  int64_t load_keys(const Task& task, int64_t block, const Scratch& scratch) const {
    const int64_t begin = block * kAdditiveBlockKeys;
    const int64_t keys = std::min(begin + kAdditiveBlockKeys, task.window.key_end) - begin;
    load_rows(scratch.rows, plan_.pitch, args_.k.row(task.batch, task.head / sizes_.group(), begin), args_.k.seq_stride,
              keys, sizes_.head_dim);
    return keys;
  }

  // One row: scores become P and dP becomes dS, zeros where the row does not see a key.
  void score_gradients(const Task& task, int64_t r, const Scratch& scratch) const {
    const V zero = V::zero();
    const V lowest = V::broadcast(-std::numeric_limits<A>::infinity());
    const int64_t begin = task.window.key_begin(task.row + r), end = task.window.key_end_of(task.row + r);
    const auto for_each_vector = [&](const auto& body) {
      for (int64_t block = task.seen.first_block(); block <= task.seen.last_block(); ++block) {
        const int64_t offset = score_offset(task, r, block), origin = block * kAdditiveBlockKeys;
        for (int64_t j = round_down(task.seen.begin_in(block), kLanes); j < task.seen.end_in(block); j += kLanes) {
          body(scratch.p + offset + j, scratch.ds + offset + j,
               [=](V x, V otherwise) { return keep_lanes(begin - origin - j, end - origin - j, x, otherwise); });
        }
      }
    };
    V largest = lowest;
    for_each_vector([&](A* p, A*, auto keep) { largest = max(keep(V::load(p), lowest), largest); });
    const A maximum = reduce_max(largest);
    const V row_max = V::broadcast(maximum == -std::numeric_limits<A>::infinity() ? 0 : maximum);
    V sum = zero, weighted = zero;
    for_each_vector([&](A* p, A* ds, auto keep) {
      const V e = keep(exponential<1>(V::load(p) - row_max), zero);
      e.store(p);
      sum = sum + e;
      weighted = weighted + keep(e * V::load(ds), zero);
    });
    const A row_sum = reduce_add(sum);
    const A scale = row_sum == 0 ? 0 : 1 / row_sum;
    const V inverse = V::broadcast(scale), delta = V::broadcast(reduce_add(weighted) * scale);
    // What delta itself rounds off is a mean again, of small numbers where a row is nearly one-hot.
    V rests = zero;
    for_each_vector([&](A* p, A* ds, auto keep) {
      const V probability = V::load(p) * inverse, difference = keep(V::load(ds) - delta, zero);
      probability.store(p);
      difference.store(ds);
      rests = mul_add(probability, difference, rests);
    });
    const V rest = V::broadcast(reduce_add(rests));
    for_each_vector([&](A* p, A* ds, auto) { (V::load(p) * (V::load(ds) - rest)).store(ds); });
  }

  // What one block of keys adds to dq and the sums of dS y, and what the task adds to its dk and dv.
  void add_block(const Task& task, int64_t block, A* dweight, const Scratch& scratch) {
    const int64_t index = block_index(task, block), key_begin = block * kAdditiveBlockKeys;
    const int64_t begin = task.seen.begin_in(block), end = task.seen.end_in(block);
    std::fill_n(scratch.dk, plan_.block_keys * plan_.pitch, A(0));
    bool direct_is_packed = false;
    for (int64_t r = 0; r < task.rows; r += kTileRows) {
      const QueryRows<A>& queries = task.queries[r / kTileRows];
      A* ds = scratch.ds + score_offset(task, r, block);
      for (int64_t i = queries.rows; i < kTileRows; ++i) std::fill_n(ds + i * kAdditivePitch, kAdditivePitch, A(0));
      const int64_t first = std::max(begin, task.window.key_begin(task.row + r) - key_begin);
      const int64_t last = std::min(end, task.window.key_end_of(task.row + r + queries.rows - 1) - key_begin);
      if (queries.bounded && bounded_[index]) {
        add_strip<false>(r, queries, ds, first, last, packed_block(index).keys, dweight, scratch);
      } else {
        if (!direct_is_packed) {
          const int64_t keys = load_keys(task, block, scratch);
          pack_panels(scratch.direct, plan_.block_keys * kLanes, scratch.rows, plan_.pitch, keys, plan_.pitch);
          direct_is_packed = true;
        }
        add_strip<true>(r, queries, ds, first, last, scratch.direct, dweight, scratch);
      }
    }
    make_dv(task, block, begin, end, scratch);

    const int64_t first_block = task.window.query_begin(key_begin) / plan_.block_rows;
    const int64_t turn = (task.block - first_block) * sizes_.group() + task.head % sizes_.group();
    while (turns_[index].load(std::memory_order_acquire) != turn) std::this_thread::yield();
    for (int64_t key = begin; key < end; ++key) {
      const int64_t head_k = task.head / sizes_.group();
      A* dk = dk_.row(task.batch, head_k, key_begin + key);
      A* dv = dv_.row(task.batch, head_k, key_begin + key);
      for (int64_t c = 0; c < sizes_.head_dim; c += kLanes) {
        add_columns(V::load(scratch.dk + c * plan_.block_keys + key * kLanes) * factor(task.head, c), dk + c,
                    sizes_.head_dim - c);
      }
      for (int64_t c = 0; c < sizes_.head_dim_v; c += kLanes) {
        add_columns(V::load(scratch.dv + key * plan_.pitch_v + c), dv + c, sizes_.head_dim_v - c);
      }
    }
    turns_[index].store(turn + 1, std::memory_order_release);
  }

  // One strip against the keys [begin, end) of a block.
  template <bool kDirect>
  void add_strip(int64_t r, const QueryRows<A>& queries, const A* ds, int64_t begin, int64_t end, const A* keys,
                 A* dweight, const Scratch& scratch) const {
    const A* q = kDirect ? queries.plain : queries.powers;
    for (int64_t c = 0; c < plan_.pitch; c += kLanes) {
      V dw = V::load(dweight + c);
      for (int64_t i = 0; i < queries.rows; i += kRowsTogether) {
        dw = dw + add_gradients<kRowsTogether, kDirect>(
                      q + i * plan_.pitch + c, ds + i * kAdditivePitch, keys + c * plan_.block_keys,
                      scratch.dk + c * plan_.block_keys, begin, end, scratch.dq + (r + i) * plan_.pitch + c,
                      plan_.pitch);
      }
      dw.store(dweight + c);
    }
  }

  // dv = P^T . dout for the keys [begin, end) of a block.
  void make_dv(const Task& task, int64_t block, int64_t begin, int64_t end, const Scratch& scratch) const {
    for (int64_t key = begin; key < end; key += kTileRows) {
      const int64_t last_key = block * kAdditiveBlockKeys + std::min(key + kTileRows, end) - 1;
      const int64_t first = std::max(task.window.query_begin(block * kAdditiveBlockKeys + key) - task.row, int64_t{0});
      const int64_t last = std::min(task.window.query_end_of(last_key) - task.row, task.rows);
      tile_rows<kTileRows, TileLayout<1, kAdditivePitch>>(
          std::max<int64_t>(last - first, 0), scratch.p + score_offset(task, first, block) + key,
          scratch.douts + first * kLanes, plan_.block_rows * kLanes, plan_.pitch_v / kLanes,
          [&](int64_t i, int64_t panel, V value) {
            if (key + i < end) value.store(scratch.dv + (key + i) * plan_.pitch_v + panel * kLanes);
          });
    }
  }

  static void add_columns(V value, A* to, int64_t count) {
    store_columns(value + V::load_first(to, std::min(count, kLanes)), to, count);
  }

  const AdditiveBackward<T>& args_;
  const AdditiveProblem& problem_;
  const AttentionSizes& sizes_;
  const ScoreWeights<T> weights_;
  const AdditiveBackwardPlan<A> plan_;
  const Sums<T> dk_, dv_;
  const Buffer<A> packed_;
  const Buffer<bool> bounded_;  // per (batch, head_k, key block)
  const Buffer<A> dweights_;  // (batch, num_heads, query_blocks, pitch): sums of dS y
  std::vector<std::atomic<int32_t>> turns_;  // (batch, num_heads_k, key_blocks): how many tasks have added to dk and dv
};

}  // namespace

template <typename T>
void additive_attention_backward(const AdditiveBackward<T>& args) {
  Backward<T> backward(args);
  const Sums<T>&dk = backward.dk(), &dv = backward.dv();
  const int threads = std::max(args.problem.num_threads, 1);
  const Buffer<std::byte> memory = allocate<std::byte>(threads * backward.scratch_bytes());
  std::atomic<int64_t> next_task{0};
#pragma omp parallel num_threads(threads)
  {
    std::byte* const scratch = memory.get() + omp_get_thread_num() * backward.scratch_bytes();
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < dk.rows(); ++row) {
      dk.clear(row);
      dv.clear(row);
    }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < backward.key_tasks(); ++index) backward.pack(index, scratch);
    // Not an OpenMP loop: the order in which tasks begin must be the order of their turns.
    for (int64_t index = next_task++; index < backward.tasks(); index = next_task++) backward.run(index, scratch);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t row = 0; row < dk.rows(); ++row) {
      dk.finish(row);
      dv.finish(row);
    }
  }
  for (int64_t head = 0; head < args.problem.sizes.num_heads; ++head) backward.sum_dweight(head);
}

template void additive_attention_backward<float>(const AdditiveBackward<float>&);
template void additive_attention_backward<double>(const AdditiveBackward<double>&);
template void additive_attention_backward<BFloat16>(const AdditiveBackward<BFloat16>&);
template void additive_attention_backward<Float16>(const AdditiveBackward<Float16>&);

}  // namespace leedl
