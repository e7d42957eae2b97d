// Additive attention, forward: one task owns a strip of kTileRows queries of one head.
//
// The exponentials of all keys are made first, once, and values are packed beside them. A strip then keeps its scores
// against all keys that it sees (16 floats per key, far less than making a score costs), so that its softmax has one
// maximum and nothing is ever rescaled, and ends with the product P . V.
#include "additive_attention.h"

namespace leedl {
namespace {

template <typename T>
class Forward {
 public:
  using A = Accumulate<T>;
  using V = Vec<A>;

  explicit Forward(const AdditiveForward<T>& args)
      : args_(args),
        problem_(args.problem),
        sizes_(args.problem.sizes),
        weights_(args.score_weight, sizes_),
        blocks_(problem_.key_blocks()),
        block_keys_(problem_.block_keys<A>()),
        panels_v_((sizes_.head_dim_v + kLanes - 1) / kLanes),
        keys_size_(block_keys_ * weights_.pitch()),
        values_size_(block_keys_ * panels_v_ * kLanes),
        keys_(allocate<A>(all_blocks() * keys_size_)),
        values_(allocate<A>(all_blocks() * values_size_)),
        bounded_(allocate<bool>(all_blocks())) {
    ByteArena arena(nullptr);
    take(arena);
    scratch_bytes_ = arena.taken();
  }

  int64_t all_blocks() const { return sizes_.batch * sizes_.num_heads_k * blocks_; }
  int64_t scratch_bytes() const { return scratch_bytes_; }

  // Packs keys and values of one block; `index` counts (batch, head_k, block).
  void pack(int64_t index, std::byte* memory) const {
    const Scratch scratch = scratch_in(memory);
    const int64_t batch = index / blocks_ / sizes_.num_heads_k, head_k = index / blocks_ % sizes_.num_heads_k;
    const int64_t begin = index % blocks_ * kAdditiveBlockKeys;
    const int64_t keys = std::min(begin + kAdditiveBlockKeys, problem_.window(batch).key_end) - begin;
    if (keys <= 0) return;
    const int64_t pitch = weights_.pitch();
    load_rows(scratch.rows, pitch, args_.k.row(batch, head_k, begin), args_.k.seq_stride, keys, sizes_.head_dim);
    bounded_[index] = are_bounded(scratch.rows, keys * pitch);
    if (bounded_[index]) {
      exponentials(scratch.rows, keys * pitch);
      pack_transposed(keys_.get() + index * keys_size_, scratch.rows, pitch, keys, pitch);
    }
    load_rows(scratch.rows, panels_v_ * kLanes, args_.v.row(batch, head_k, begin), args_.v.seq_stride, keys,
              sizes_.head_dim_v);
    pack_panels(values_.get() + index * values_size_, block_keys_ * kLanes, scratch.rows, panels_v_ * kLanes, keys,
                panels_v_ * kLanes);
  }

  // One strip of queries; `index` counts (strip, batch, head), the last strips first: with a causal window they see
  // most.
  void run(int64_t index, std::byte* memory) const {
    const int64_t pairs = sizes_.batch * sizes_.num_heads;
    const int64_t batch = index % pairs / sizes_.num_heads, head = index % pairs % sizes_.num_heads;
    const int64_t row = (problem_.strips() - 1 - index / pairs) * kTileRows;
    const int64_t rows = std::min(kTileRows, sizes_.seqlen_q - row);
    const AttentionWindow window = problem_.window(batch);
    const Strip strip{batch, head, row, rows, {window.key_begin(row), window.key_end_of(row + rows - 1)}};
    if (strip.seen.empty()) {
      for (int64_t r = row; r < row + rows; ++r) write_masked_row(batch, head, r);
      return;
    }
    const Scratch scratch = scratch_in(memory);
    make_scores(strip, window, scratch);
    softmax(strip, scratch);
    add_values(strip, scratch);
    write(strip, scratch);
  }

 private:
  static constexpr int64_t kLanes = V::kSize;
  static constexpr int64_t kBlockScores = kTileRows * kAdditivePitch;

  // What one thread works in.
  struct Scratch {
    A* rows;     // rows of a block of keys or values, before they are packed
    A* direct;   // panels of k itself, where products do not fit
    A* plain;    // [kTileRows][pitch], see QueryRows
    A* powers;   // [kTileRows][pitch]
    A* scores;   // [blocks][kTileRows][kAdditivePitch]
    A* out;      // [kTileRows][panels_v * W], not yet divided by the sum
    A* row_max;  // [kTileRows]
    A* row_sum;  // [kTileRows]
  };
  struct Strip {
    int64_t batch, head, row, rows;
    SeenKeys seen;
  };

  Scratch take(ByteArena& arena) const {
    const int64_t pitch = weights_.pitch();
    Scratch scratch;
    arena.take(scratch.rows, block_keys_ * std::max(pitch, panels_v_ * kLanes));
    arena.take(scratch.direct, keys_size_);
    arena.take(scratch.plain, kTileRows * pitch);
    arena.take(scratch.powers, kTileRows * pitch);
    arena.take(scratch.scores, problem_.seen_blocks(kTileRows) * kBlockScores);
    arena.take(scratch.out, kTileRows * panels_v_ * kLanes);
    arena.take(scratch.row_max, kTileRows);
    arena.take(scratch.row_sum, kTileRows);
    return scratch;
  }
  Scratch scratch_in(std::byte* memory) const {
    ByteArena arena(memory);
    return take(arena);
  }

  int64_t block_index(const Strip& strip, int64_t block) const {
    const int64_t head_k = strip.head / sizes_.group();
    return (strip.batch * sizes_.num_heads_k + head_k) * blocks_ + block;
  }

  void make_scores(const Strip& strip, const AttentionWindow& window, const Scratch& scratch) const {
    const int64_t pitch = weights_.pitch();
    const QueryRows<A> queries = load_queries(args_.q.row(strip.batch, strip.head, strip.row), args_.q.seq_stride,
                                              strip.rows, sizes_.head_dim, pitch, scratch.plain, scratch.powers);
    for (int64_t block = strip.seen.first_block(); block <= strip.seen.last_block(); ++block) {
      const int64_t begin = round_down(strip.seen.begin_in(block), kLanes), end = round_up(strip.seen.end_in(block), kLanes);
      const int64_t origin = block * kAdditiveBlockKeys + begin, index = block_index(strip, block);
      A* scores = scratch.scores + (block - strip.seen.first_block()) * kBlockScores + begin;
      if (queries.bounded && bounded_[index]) {
        product_scores(queries, weights_.head(strip.head), sizes_.head_dim,
                       keys_.get() + index * keys_size_ + begin * pitch, (end - begin) / kLanes, scores);
      } else {
        const int64_t keys = strip.seen.end_in(block) - begin;
        load_rows(scratch.rows, pitch, args_.k.row(strip.batch, strip.head / sizes_.group(), origin), args_.k.seq_stride,
                  keys, sizes_.head_dim);
        pack_transposed(scratch.direct, scratch.rows, pitch, keys, pitch);
        direct_scores(queries, weights_.head(strip.head), sizes_.head_dim, scratch.direct, (end - begin) / kLanes,
                      scores);
      }
      for (int64_t r = 0; r < strip.rows; ++r) {
        mask_row(scores + r * kAdditivePitch, 0, end - begin, window.key_begin(strip.row + r) - origin,
                 window.key_end_of(strip.row + r) - origin, -std::numeric_limits<A>::infinity());
      }
    }
  }

  // Scores become exp(score - maximum).
  void softmax(const Strip& strip, const Scratch& scratch) const {
    for (int64_t r = 0; r < strip.rows; ++r) {
      V largest = V::broadcast(-std::numeric_limits<A>::infinity());
      for_each_block(strip, scratch, r, [&](A* scores, int64_t columns) {
        for (int64_t j = 0; j < columns; j += kLanes) largest = max(V::load(scores + j), largest);
      });
      const A row_max = reduce_max(largest);
      // A row that sees no key subtracts 0: -inf - -inf would be NaN.
      const V offset = V::broadcast(row_max == -std::numeric_limits<A>::infinity() ? 0 : row_max);
      V sum = V::zero();
      for_each_block(strip, scratch, r, [&](A* scores, int64_t columns) {
        V block_sum = V::zero();
        for (int64_t j = 0; j < columns; j += kLanes) {
          const V p = exponential<1>(V::load(scores + j) - offset);
          p.store(scores + j);
          block_sum = block_sum + p;
        }
        sum = sum + block_sum;
      });
      scratch.row_max[r] = row_max;
      scratch.row_sum[r] = reduce_add(sum);
    }
  }

  template <typename Body>
  void for_each_block(const Strip& strip, const Scratch& scratch, int64_t row, const Body& body) const {
    A* scores = scratch.scores + row * kAdditivePitch;
    for (int64_t block = strip.seen.first_block(); block <= strip.seen.last_block(); ++block, scores += kBlockScores) {
      const int64_t begin = round_down(strip.seen.begin_in(block), kLanes);
      body(scores + begin, round_up(strip.seen.end_in(block), kLanes) - begin);
    }
  }

  // out = P . V over the keys [begin, end), exactly: keys that no row sees may hold NaN.
  void add_values(const Strip& strip, const Scratch& scratch) const {
    const int64_t pitch = panels_v_ * kLanes;
    for (int64_t block = strip.seen.first_block(); block <= strip.seen.last_block(); ++block) {
      const int64_t begin = strip.seen.begin_in(block), depth = strip.seen.end_in(block) - begin;
      const A* p = scratch.scores + (block - strip.seen.first_block()) * kBlockScores + begin;
      const A* values = values_.get() + block_index(strip, block) * values_size_ + begin * kLanes;
      const bool first = block == strip.seen.first_block();
      const auto add = [&](int64_t row, int64_t panel, V value) {
        A* to = scratch.out + row * pitch + panel * kLanes;
        (first ? value : V::load(to) + value).store(to);
      };
      using Layout = TileLayout<kAdditivePitch, 1>;
      if (strip.rows == kTileRows) {
        tile_rows<kTileRows, Layout>(depth, p, values, block_keys_ * kLanes, panels_v_, add);
      } else {
        for (int64_t r = 0; r < strip.rows; ++r) {
          tile_rows<1, Layout>(depth, p + r * kAdditivePitch, values, block_keys_ * kLanes, panels_v_,
                               [&](int64_t, int64_t panel, V value) { add(r, panel, value); });
        }
      }
    }
  }

  void write(const Strip& strip, const Scratch& scratch) const {
    const int64_t pitch = panels_v_ * kLanes;
    for (int64_t r = 0; r < strip.rows; ++r) {
      if (scratch.row_sum[r] == 0) {
        write_masked_row(strip.batch, strip.head, strip.row + r);
        continue;
      }
      T* to = args_.out.row(strip.batch, strip.head, strip.row + r);
      const V factor = V::broadcast(1 / scratch.row_sum[r]);
      for (int64_t column = 0; column < sizes_.head_dim_v; column += kLanes) {
        const V value = V::load(scratch.out + r * pitch + column) * factor;
        store_columns(value, to + column, sizes_.head_dim_v - column);
      }
      write_statistics(strip.batch, strip.head, strip.row + r, scratch.row_max[r], scratch.row_sum[r]);
    }
  }

  void write_masked_row(int64_t batch, int64_t head, int64_t row) const {
    std::fill_n(args_.out.row(batch, head, row), sizes_.head_dim_v, T{});
    write_statistics(batch, head, row, std::numeric_limits<A>::infinity(), 1);
  }

  void write_statistics(int64_t batch, int64_t head, int64_t row, A row_max, A row_sum) const {
    if (args_.row_max == nullptr) return;
    const int64_t index = (batch * sizes_.num_heads + head) * sizes_.seqlen_q + row;
    args_.row_max[index] = row_max;
    args_.row_sum[index] = row_sum;
  }

  const AdditiveForward<T>& args_;
  const AdditiveProblem& problem_;
  const AttentionSizes& sizes_;
  const ScoreWeights<T> weights_;
  const int64_t blocks_, block_keys_, panels_v_, keys_size_, values_size_;
  const Buffer<A> keys_;    // per (batch, head_k, block): panels of [pitch][W] of exp(2 k)
  const Buffer<A> values_;  // per (batch, head_k, block): [panels_v] panels of [block_keys][W]
  const Buffer<bool> bounded_;
  int64_t scratch_bytes_;
};

}  // namespace

template <typename T>
void additive_attention_forward(const AdditiveForward<T>& args) {
  const AttentionSizes& s = args.problem.sizes;
  const int64_t tasks = args.problem.strips() * s.batch * s.num_heads;
  if (tasks == 0) return;
  args.out.advise(s.batch, s.num_heads, s.seqlen_q, s.head_dim_v);
  const Forward<T> forward(args);
  const int threads = static_cast<int>(std::min<int64_t>(std::max(args.problem.num_threads, 1), tasks));
  const Buffer<std::byte> memory = allocate<std::byte>(threads * forward.scratch_bytes());
#pragma omp parallel num_threads(threads)
  {
    std::byte* const scratch = memory.get() + omp_get_thread_num() * forward.scratch_bytes();
#pragma omp for schedule(static)
    for (int64_t index = 0; index < forward.all_blocks(); ++index) forward.pack(index, scratch);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < tasks; ++index) forward.run(index, scratch);
  }
}

template void additive_attention_forward<float>(const AdditiveForward<float>&);
template void additive_attention_forward<double>(const AdditiveForward<double>&);
template void additive_attention_forward<BFloat16>(const AdditiveForward<BFloat16>&);
template void additive_attention_forward<Float16>(const AdditiveForward<Float16>&);

}  // namespace leedl
