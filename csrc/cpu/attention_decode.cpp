// Attention, forward, for few queries: all queries that share a key head make one strip of at most kTileRows rows, as
// when a model generates text.
//
// A task owns one split of the keys of one key head: it reads the split's keys and values once and leaves a maximum, a
// sum and an output per row. Splits are combined in their order ("split-KV", Dao et al. 2023, Flash-Decoding). Where
// they lie depends on nothing but the position of a key. Scores are the very numbers of attention_forward.cpp, so that
// the backward pass makes the same probabilities of them.
#include "attention_output.h"

namespace leedl {
namespace {

constexpr int64_t kSplitKeys = 1024;
constexpr int64_t kPackedKeys = 32;  // of one packing: they stay in the first-level cache
constexpr int64_t kScorePitch = kSplitKeys + 16;

// Vectors of accumulators beside each other for each row, so that there are enough of them to hide their latency.
constexpr int64_t tile_vecs(int64_t rows) {
  return std::clamp<int64_t>(kVectorRegisters / 2 / rows, 2, 8);
}

// The memory of one thread.
template <typename E, typename A = typename Operand<E>::Sum>
struct Scratch {
  E* queries;  // [kTileRows][kHeadPitch]
  E* keys;     // [kPackedKeys / W] panels of [depth(head_dim)][W]
  A* scores;   // [kTileRows][kScorePitch]
  A* factors;  // of dropout [kScorePitch]
  int64_t bytes;

  Scratch(std::byte* base, const AttentionSizes& s) {
    ByteArena arena(base);
    arena.take(queries, kTileRows * kHeadPitch);
    arena.take(keys, kPackedKeys * depth_of<E>(s.head_dim));
    arena.take(scores, kTileRows * kScorePitch);
    arena.take(factors, kScorePitch);
    bytes = arena.taken();
  }
};

// One split's part of one row: `out` numbers, then the maximum and the sum.
template <typename A>
struct Part {
  A* out;
  A *row_max, *row_sum;
};

// sums[row][column] += p[row][key] * values[key][column] for kVecs vectors of columns, the last of which has `width`.
template <int64_t kRows, int64_t kVecs, typename A, typename T>
void add_values(int64_t keys, const A* p, const T* values, int64_t stride, int64_t width, A* sums, int64_t pitch) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  Vec<A> acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int64_t vec = 0; vec < kVecs; ++vec) acc[row][vec] = Vec<A>::load(sums + row * pitch + vec * kLanes);
  }
#pragma GCC unroll 1
  for (int64_t key = 0; key < keys; ++key, values += stride) {
    Vec<A> columns[kVecs];
#pragma GCC unroll 8
    for (int64_t vec = 0; vec < kVecs; ++vec) {
      const bool whole = vec + 1 < kVecs || width == kLanes;
      columns[vec] = whole ? Vec<A>::load(values + vec * kLanes) : Vec<A>::load_first(values + vec * kLanes, width);
    }
#pragma GCC unroll 16
    for (int64_t row = 0; row < kRows; ++row) {
      const Vec<A> probability = Vec<A>::broadcast(p[row * kScorePitch + key]);
#pragma GCC unroll 8
      for (int64_t vec = 0; vec < kVecs; ++vec) acc[row][vec] = mul_add(probability, columns[vec], acc[row][vec]);
    }
  }
#pragma GCC unroll 16
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int64_t vec = 0; vec < kVecs; ++vec) acc[row][vec].store(sums + row * pitch + vec * kLanes);
  }
}

// One row of scores becomes exp2((score - maximum) * factor).
template <typename A>
void softmax_row(A* scores, int64_t columns, A factor, A& row_max, A& row_sum) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  Vec<A> top = Vec<A>::broadcast(-std::numeric_limits<A>::infinity());
  for (int64_t column = 0; column < columns; column += kLanes) top = max(Vec<A>::load(scores + column), top);
  row_max = reduce_max(top);
  const Vec<A> offset = Vec<A>::broadcast(row_max < std::numeric_limits<A>::lowest() ? A(0) : row_max);
  const Vec<A> scale = Vec<A>::broadcast(factor);
  Vec<A> sum = Vec<A>::zero();
  for (int64_t column = 0; column < columns; column += kLanes) {
    const Vec<A> p = exp2((Vec<A>::load(scores + column) - offset) * scale);
    p.store(scores + column);
    sum = sum + p;
  }
  row_sum = reduce_add(sum);
}

template <typename T, typename E, int64_t kRows>
class DecodeTask {
 public:
  using A = Accumulate<T>;

  DecodeTask(const AttentionForward<T>& args, const Scores<T>& scores, std::byte* memory)
      : args_(args), sizes_(args.options.sizes), scores_(scores), scratch_(memory, sizes_) {}

  // The keys [begin, end) of one split; parts: of the split's rows.
  void run(const Sample& sample, int64_t head_k, int64_t begin, int64_t end, const Part<A>& part, int64_t pitch) {
    const int64_t seqlen_q = sizes_.seqlen_q, group = sizes_.group(), rows = group * seqlen_q;
    const int64_t first_head = head_k * group, depth = depth_of<E>(sizes_.head_dim);
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t i = 0; i < seqlen_q; ++i) {
        pack_rows<1, kHeadPitch>(scratch_.queries + (g * seqlen_q + i) * kHeadPitch,
                                 args_.q.query(sample, first_head + g, i), args_.q.seq_stride, 1, sizes_.head_dim,
                                 scores_.scale().sign);
      }
    }
    for (int64_t row = rows; row < kRows; ++row) {
      std::fill_n(scratch_.queries + row * kHeadPitch, depth, E{});
    }
    const int64_t origin = round_down(begin, kLanes), columns = round_up(end, kLanes) - origin;
    for (int64_t key = origin; key < end; key += kPackedKeys) {
      const int64_t count = std::min(kPackedKeys, end - key);
      pack_transposed(scratch_.keys, args_.k.key(sample, head_k, key), args_.k.seq_stride, count, sizes_.head_dim);
      const int64_t runs = score_runs(seqlen_q), run = (depth + runs - 1) / runs;
      for (int64_t k = 0; k < depth; k += run) {
        tile_rows<kRows, TileLayout<kHeadPitch, 1>, tile_vecs(kRows)>(
            std::min(run, depth - k), scratch_.queries + k, scratch_.keys + k * kLanes, depth * kLanes,
            (count + kLanes - 1) / kLanes, [&](int64_t row, int64_t panel, Vec<A> value) {
              A* to = scratch_.scores + row * kScorePitch + key - origin + panel * kLanes;
              (k == 0 ? value : Vec<A>::load(to) + value).store(to);
            });
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      A* scores = scratch_.scores + row * kScorePitch;
      const int64_t head = first_head + row / seqlen_q, i = row % seqlen_q;
      if (scores_.modified()) scores_.modify(sample, head, i, origin, columns, scores, nullptr);
      mask_row(scores, 0, columns, std::max(sample.window.key_begin(i), begin) - origin,
               std::min(sample.window.key_end_of(i), end) - origin, -std::numeric_limits<A>::infinity());
      if (scores_.softmax()) {
        softmax_row(scores, columns, scores_.scale().factor, part.row_max[row], part.row_sum[row]);
      } else {
        scores_.activate(scores, columns);
      }
      if (scores_.drops()) {
        scores_.dropout_factors(sample, head, i, origin, columns, scratch_.factors);
        multiply_row(scores, scratch_.factors, columns);
      }
    }
    std::fill_n(part.out, kRows * pitch, A(0));
    for (int64_t key = begin; key < end; key += kPackedKeys) {
      values(scratch_.scores + key - origin, args_.v.key(sample, head_k, key), std::min(kPackedKeys, end - key),
             part.out, pitch);
    }
  }

 private:
  static constexpr int64_t kLanes = Vec<A>::kSize;

  void values(const A* p, const T* v, int64_t keys, A* out, int64_t pitch) {
    constexpr int64_t kVecs = tile_vecs(kRows);
    const int64_t head_dim = sizes_.head_dim_v;
    int64_t column = 0;
    for (; column + kVecs * kLanes <= head_dim; column += kVecs * kLanes) {
      leedl::add_values<kRows, kVecs>(keys, p, v + column, args_.v.seq_stride, kLanes, out + column, pitch);
    }
    if (kVecs > 4 && column + 4 * kLanes <= head_dim) {
      leedl::add_values<kRows, 4>(keys, p, v + column, args_.v.seq_stride, kLanes, out + column, pitch);
      column += 4 * kLanes;
    }
    for (; column < head_dim; column += kLanes) {
      leedl::add_values<kRows, 1>(keys, p, v + column, args_.v.seq_stride, std::min(head_dim - column, kLanes),
                                  out + column, pitch);
    }
  }

  const AttentionForward<T>& args_;
  const AttentionSizes& sizes_;
  const Scores<T>& scores_;
  Scratch<E> scratch_;
};

// out of one row from the parts of its splits, in their order.
template <typename T>
void combine(const AttentionForward<T>& args, const Scores<T>& scores, const Sample& sample, int64_t head, int64_t row,
             const Part<Accumulate<T>>* parts, int64_t count, int64_t index, int64_t pitch) {
  using A = Accumulate<T>;
  constexpr int64_t kLanes = Vec<A>::kSize;
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  const RowWriter<T> writer(args, scores);
  A row_max = scores.has_sinks() ? scores.sink(head) : -kInfinity;
  for (int64_t split = 0; split < count && scores.softmax(); ++split) {
    row_max = std::max(row_max, parts[split].row_max[index]);
  }
  if (count == 0 || (scores.softmax() && row_max == -kInfinity)) return writer.write_masked(sample, head, row);

  const auto weight_of = [&](A maximum) {
    if (!scores.softmax()) return A(1);
    return exp2(Vec<A>::broadcast((maximum - row_max) * scores.scale().factor)).lanes[0];
  };
  alignas(64) A sums[kMaxHeadDim + kLanes] = {};
  A row_sum = !scores.softmax() ? A(1) : scores.has_sinks() ? weight_of(scores.sink(head)) : A(0);
  for (int64_t split = 0; split < count; ++split) {
    const Part<A>& part = parts[split];
    const A weight = weight_of(scores.softmax() ? part.row_max[index] : A(0));
    if (scores.softmax()) row_sum += weight * part.row_sum[index];
    for (int64_t column = 0; column < pitch; column += kLanes) {
      mul_add(Vec<A>::load(part.out + index * pitch + column), Vec<A>::broadcast(weight), Vec<A>::load(sums + column))
          .store(sums + column);
    }
  }
  const A lse = row_max * scores.scale().lse_scale + log(Vec<A>::broadcast(row_sum)).lanes[0];
  writer.write(sample, head, row, sums, scores.kept() / row_sum, lse, row_max, row_sum);
}

template <typename T, typename E, int64_t kRows>
void decode(const AttentionForward<T>& args) {
  using A = Accumulate<T>;
  const AttentionSizes& s = args.options.sizes;
  const int64_t pairs = s.batch * s.num_heads_k, pitch = round_up(s.head_dim_v, Vec<A>::kSize);
  const Scores<T> scores(args.options, args.terms);
  // The splits that a sample's queries see, and where their parts stand.
  const auto split_range = [&](const Sample& sample) {
    const int64_t begin = sample.window.key_begin(0), end = sample.window.key_end_of(s.seqlen_q - 1);
    return begin < end ? std::pair(begin / kSplitKeys, (end - 1) / kSplitKeys + 1) : std::pair<int64_t, int64_t>(0, 0);
  };
  std::vector<int64_t> first_part(s.batch + 1, 0);  // of each sample, counted in splits of one key head
  for (int64_t b = 0; b < s.batch; ++b) {
    const auto [first, end] = split_range(args.options.sample(b));
    first_part[b + 1] = first_part[b] + end - first;
  }
  const int64_t tasks = first_part[s.batch] * s.num_heads_k, part_size = kRows * (pitch + 2);
  const Buffer<A> memory = allocate<A>(tasks * part_size);
  std::vector<Part<A>> parts(tasks);
  for (int64_t task = 0; task < tasks; ++task) {
    A* out = memory.get() + task * part_size;
    parts[task] = {out, out + kRows * pitch, out + kRows * (pitch + 1)};
  }
  const int64_t most = std::max<int64_t>(tasks, 1);
  const int threads = static_cast<int>(std::min<int64_t>(std::max(args.options.num_threads, 1), most));
  const int64_t scratch_bytes = Scratch<E>(nullptr, s).bytes;
  const Buffer<std::byte> scratch = allocate<std::byte>(threads * scratch_bytes);

#pragma omp parallel num_threads(threads)
  {
    DecodeTask<T, E, kRows> task(args, scores, scratch.get() + omp_get_thread_num() * scratch_bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < tasks; ++index) {
      const auto next = std::upper_bound(first_part.begin(), first_part.end(), index / s.num_heads_k);
      const int64_t b = next - first_part.begin() - 1;
      const Sample sample = args.options.sample(b);
      const auto [first, end] = split_range(sample);
      const int64_t local = index - first_part[b] * s.num_heads_k;  // the splits of a head one after another
      const int64_t split = first + local % (end - first);
      task.run(sample, local / (end - first), std::max(sample.window.key_begin(0), split * kSplitKeys),
               std::min(sample.window.key_end_of(s.seqlen_q - 1), (split + 1) * kSplitKeys), parts[index], pitch);
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t b = pair / s.num_heads_k, head_k = pair % s.num_heads_k;
      const Sample sample = args.options.sample(b);
      const int64_t count = first_part[b + 1] - first_part[b];
      const Part<A>* own = parts.data() + first_part[b] * s.num_heads_k + head_k * count;
      for (int64_t row = 0; row < s.group() * s.seqlen_q; ++row) {
        combine(args, scores, sample, head_k * s.group() + row / s.seqlen_q, row % s.seqlen_q, own, count, row, pitch);
      }
    }
  }
}

}  // namespace

bool attention_decodes(const AttentionOptions& options) {
  const AttentionSizes& s = options.sizes;
  return !options.packed() && s.num_heads_k > 0 && s.group() * s.seqlen_q <= kTileRows;
}

template <typename T>
void attention_decode(const AttentionForward<T>& args) {
  const int64_t rows = args.options.sizes.group() * args.options.sizes.seqlen_q;
  if (rows == 0 || args.options.sizes.batch == 0) return;
  dispatch_operand<T>([&](auto tag) {
    using E = typename decltype(tag)::Type;
    if (rows == 1) return decode<T, E, 1>(args);
    if (rows == 2) return decode<T, E, 2>(args);
    if (rows <= 4) return decode<T, E, 4>(args);
    if (rows <= 8 && kTileRows > 8) return decode<T, E, 8>(args);
    decode<T, E, kTileRows>(args);
  });
}

template void attention_decode<float>(const AttentionForward<float>&);
template void attention_decode<double>(const AttentionForward<double>&);
template void attention_decode<BFloat16>(const AttentionForward<BFloat16>&);
template void attention_decode<Float16>(const AttentionForward<Float16>&);

}  // namespace leedl
