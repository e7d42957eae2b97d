// Attention, forward, for few queries: all queries that share a key head make one strip of at most kTileRows rows, as
// when a model generates text.
//
// A task owns one split of the keys of one key head: it reads the split's keys and values once and leaves a maximum, a
// sum and an output per row. Splits are combined in their order ("split-KV", Dao et al. 2023, Flash-Decoding). Where
// they lie depends on nothing but the position of a key.
//
// Memory is the limit: a core reads 6 bytes in a cycle, so that a key and its value, 64 bfloat16 numbers each, take 40
// cycles. It reads the keys of a split as kStreams streams side by side, which processors foresee better than one. Keys
// of few rows are multiplied as they lie, a vector of a key by a vector of the query, and sums are added up across lanes
// for a vector of keys at once; more rows than kDirectRows share the transposed keys.
#include "attention_output.h"

namespace leedl {
namespace {

constexpr int64_t kSplitKeys = 1024;
constexpr int64_t kPackedKeys = 32;  // of one packing: they stay in the first-level cache
constexpr int64_t kDirectRows = 4;
constexpr int64_t kStreams = 4;
constexpr int64_t kSplitPitch = kSplitKeys + 16;

// Vectors of accumulators beside each other for each row, so that there are enough of them to hide their latency.
constexpr int64_t tile_vecs(int64_t rows) {
  return std::clamp<int64_t>(kVectorRegisters / 2 / rows, 2, 8);
}

// The memory of one thread. What holds operands has room for the widest of them.
template <typename A>
struct Scratch {
  std::byte* queries;  // [kTileRows][kHeadPitch]
  std::byte* keys;     // [kPackedKeys / W] panels of [depth(head_dim)][W]
  A* scores;           // [kTileRows][kSplitPitch]
  A* factors;          // of dropout [kSplitPitch]
  int64_t bytes;

  Scratch(std::byte* base, const AttentionSizes& s) {
    ByteArena arena(base);
    arena.take(queries, kTileRows * kHeadPitch * static_cast<int64_t>(sizeof(A)));
    arena.take(keys, kPackedKeys * s.head_dim * static_cast<int64_t>(sizeof(A)));
    arena.take(scores, kTileRows * kSplitPitch);
    arena.take(factors, kSplitPitch);
    bytes = arena.taken();
  }
};

// One split's part of one row: `out` numbers, then the maximum and the sum.
template <typename A>
struct Part {
  A* out;
  A *row_max, *row_sum;
};

// Vectors of a row of keys as operands of type E; each holds kNumbers numbers.
template <typename E, typename T>
struct KeyVectors {
  using V = Vec<Accumulate<T>>;
  static constexpr int64_t kNumbers = V::kSize * Operand<E>::kDepth;
  static V load(const T* p) { return V::load(p); }
  static V load_first(const T* p, int64_t numbers) { return V::load_first(p, numbers); }
};

#if defined(__AVX512F__)
template <>
struct KeyVectors<BFloat16Pair, BFloat16> {
  using V = Vec<float>;
  static constexpr int64_t kNumbers = V::kSize * Operand<BFloat16Pair>::kDepth;
  static V load(const BFloat16* p) { return Operand<BFloat16Pair>::load(reinterpret_cast<const BFloat16Pair*>(p)); }
  static V load_first(const BFloat16* p, int64_t numbers) {
    return {_mm512_castsi512_ps(detail::first_halves(p, numbers))};
  }
};
#endif

// scores[row][key] = q[row] . keys[key], for a few keys more than there are: they repeat the last one.
template <typename E, int64_t kRows, typename T, typename A = Accumulate<T>>
__attribute__((noinline)) void multiply_keys(const E* queries, const T* keys, int64_t stride, int64_t count,
                                             int64_t head_dim, A* scores) {
  using Keys = KeyVectors<E, T>;
  constexpr int64_t kLanes = Vec<A>::kSize;
  constexpr int64_t kTogether = std::min(kVectorRegisters / 2 / kRows, kStreams);  // streams that the registers hold
  const int64_t part = round_up(count, kStreams * kLanes) / kStreams;             // keys of a stream
  for (int64_t first = 0; first < part; first += kLanes) {
    Vec<A> sums[kStreams][kRows][kLanes];
#pragma GCC unroll 1
    for (int64_t i = 0; i < kLanes; ++i) {
#pragma GCC unroll 4
      for (int64_t stream = 0; stream < kStreams; stream += kTogether) {
        const T* at[kTogether];
        Vec<A> acc[kTogether][kRows];
#pragma GCC unroll 4
        for (int64_t j = 0; j < kTogether; ++j) {
          at[j] = keys + std::min((stream + j) * part + first + i, count - 1) * stride;
#pragma GCC unroll 4
          for (int64_t row = 0; row < kRows; ++row) acc[j][row] = Vec<A>::zero();
        }
        const auto multiply = [&](int64_t k, const auto& load) __attribute__((always_inline)) {
          Vec<A> columns[kTogether];
#pragma GCC unroll 4
          for (int64_t j = 0; j < kTogether; ++j) columns[j] = load(at[j] + k);
#pragma GCC unroll 4
          for (int64_t row = 0; row < kRows; ++row) {
            const Vec<A> query = Operand<E>::load(queries + row * kHeadPitch + k / Operand<E>::kDepth);
#pragma GCC unroll 4
            for (int64_t j = 0; j < kTogether; ++j) {
              acc[j][row] = Operand<E>::multiply_add(query, columns[j], acc[j][row]);
            }
          }
        };
        int64_t k = 0;
        for (; k + Keys::kNumbers <= head_dim; k += Keys::kNumbers) {
          multiply(k, [](const T* p) { return Keys::load(p); });
        }
        if (k < head_dim) multiply(k, [&](const T* p) { return Keys::load_first(p, head_dim - k); });
#pragma GCC unroll 4
        for (int64_t j = 0; j < kTogether; ++j) {
#pragma GCC unroll 4
          for (int64_t row = 0; row < kRows; ++row) sums[stream + j][row][i] = acc[j][row];
        }
      }
    }
    for (int64_t stream = 0; stream < kStreams; ++stream) {
#pragma GCC unroll 4
      for (int64_t row = 0; row < kRows; ++row) {
        reduce_add(sums[stream][row]).store(scores + row * kSplitPitch + stream * part + first);
      }
    }
  }
}

// The values of a split as streams of `part` rows, the last of which repeats the last row where it is shorter.
template <typename T>
struct ValueStreams {
  const T* first;
  const T* last;
  int64_t stride, part;

  const T* row(int64_t stream, int64_t i) const { return std::min(first + (stream * part + i) * stride, last); }
};

// sums[row][column] += p[row][key] * values[key][column] for the keys [begin, end) of all streams and kVecs vectors of
// columns from `column` on, the last of which has `width`.
template <int64_t kRows, int64_t kVecs, typename A, typename T>
void add_values(const ValueStreams<T>& values, int64_t begin, int64_t end, const A* p, int64_t column, int64_t width,
                A* sums, int64_t pitch) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  Vec<A> acc[kRows][kVecs];
  sums += column;
#pragma GCC unroll 16
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int64_t vec = 0; vec < kVecs; ++vec) acc[row][vec] = Vec<A>::load(sums + row * pitch + vec * kLanes);
  }
#pragma GCC unroll 1
  for (int64_t i = begin; i < end; ++i) {
#pragma GCC unroll 4
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      const T* from = values.row(stream, i) + column;
      Vec<A> columns[kVecs];
#pragma GCC unroll 8
      for (int64_t vec = 0; vec < kVecs; ++vec) {
        const bool whole = vec + 1 < kVecs || width == kLanes;
        columns[vec] = whole ? Vec<A>::load(from + vec * kLanes) : Vec<A>::load_first(from + vec * kLanes, width);
      }
#pragma GCC unroll 16
      for (int64_t row = 0; row < kRows; ++row) {
        const Vec<A> probability = Vec<A>::broadcast(p[row * kSplitPitch + stream * values.part + i]);
#pragma GCC unroll 8
        for (int64_t vec = 0; vec < kVecs; ++vec) acc[row][vec] = mul_add(probability, columns[vec], acc[row][vec]);
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int64_t vec = 0; vec < kVecs; ++vec) acc[row][vec].store(sums + row * pitch + vec * kLanes);
  }
}

// The products of kRows rows, whose operands are of type E.
template <typename T, typename E, int64_t kRows>
struct Products {
  using A = Accumulate<T>;
  static constexpr int64_t kLanes = Vec<A>::kSize;

  static void pack_query(const T* query, int64_t head_dim, A sign, int64_t row, std::byte* queries) {
    E* to = reinterpret_cast<E*>(queries) + row * kHeadPitch;
    std::fill_n(to, round_up(depth_of<E>(head_dim), kLanes), E{});  // multiply_keys reads whole vectors
    pack_rows<1, kHeadPitch>(to, query, 0, query != nullptr, head_dim, sign);
  }

  // scores[row][key] = q[row] . keys[key], the products of each summed in `runs` runs where keys are transposed.
  static void multiply(const std::byte* queries, int64_t runs, const T* keys, int64_t stride, int64_t count,
                       int64_t head_dim, std::byte* packed, A* scores) {
    const E* q = reinterpret_cast<const E*>(queries);
    if constexpr (kRows <= kDirectRows) {
      multiply_keys<E, kRows>(q, keys, stride, count, head_dim, scores);
    } else {
      E* panels = reinterpret_cast<E*>(packed);
      const int64_t depth = depth_of<E>(head_dim), run = (depth + runs - 1) / runs;
      for (int64_t key = 0; key < count; key += kPackedKeys) {
        const int64_t part = std::min(kPackedKeys, count - key);
        pack_transposed(panels, keys + key * stride, stride, part, head_dim);
        for (int64_t k = 0; k < depth; k += run) {
          tile_rows<kRows, TileLayout<kHeadPitch, 1>, tile_vecs(kRows)>(
              std::min(run, depth - k), q + k, panels + k * kLanes, depth * kLanes, (part + kLanes - 1) / kLanes,
              [&](int64_t row, int64_t panel, Vec<A> value) {
                A* to = scores + row * kSplitPitch + key + panel * kLanes;
                (k == 0 ? value : Vec<A>::load(to) + value).store(to);
              });
        }
      }
    }
  }

  // out[row] = p[row] . values; p has room for kStreams more keys.
  static void add(A* p, const T* values, int64_t stride, int64_t count, int64_t head_dim, A* out, int64_t pitch) {
    constexpr int64_t kVecs = tile_vecs(kRows);
    const int64_t part = (count + kStreams - 1) / kStreams;
    const ValueStreams<T> streams = {values, values + (count - 1) * stride, stride, part};
    for (int64_t row = 0; row < kRows; ++row) {
      std::fill_n(p + row * kSplitPitch + count, kStreams * part - count, A(0));
      std::fill_n(out + row * pitch, pitch, A(0));
    }
    // Where columns take more than one pass, the next finds the values in the first-level cache.
    const bool single_pass = head_dim == kVecs * kLanes || (kVecs > 4 && head_dim == 4 * kLanes);
    const int64_t block = single_pass ? part : kPackedKeys / kStreams;
    for (int64_t begin = 0; begin < part; begin += block) {
      const auto add_columns = [&](auto vecs, int64_t column, int64_t width) {
        add_values<kRows, vecs()>(streams, begin, std::min(begin + block, part), p, column, width, out, pitch);
      };
      int64_t column = 0;
      for (; column + kVecs * kLanes <= head_dim; column += kVecs * kLanes) {
        add_columns(std::integral_constant<int64_t, kVecs>(), column, kLanes);
      }
      if (kVecs > 4 && column + 4 * kLanes <= head_dim) {
        add_columns(std::integral_constant<int64_t, 4>(), column, kLanes);
        column += 4 * kLanes;
      }
      for (; column < head_dim; column += kLanes) {
        add_columns(std::integral_constant<int64_t, 1>(), column, std::min(head_dim - column, kLanes));
      }
    }
  }
};

// The Products of the rows and the operands that were chosen: what calls them is compiled once.
template <typename T>
struct ProductTable {
  using A = Accumulate<T>;

  template <typename E, int64_t kRows>
  static ProductTable of() {
    using P = Products<T, E, kRows>;
    return {kRows, P::pack_query, P::multiply, P::add};
  }

  int64_t rows;
  void (*pack_query)(const T*, int64_t, A, int64_t, std::byte*);
  void (*multiply)(const std::byte*, int64_t, const T*, int64_t, int64_t, int64_t, std::byte*, A*);
  void (*add)(A*, const T*, int64_t, int64_t, int64_t, A*, int64_t);
};

// One row of scores becomes exp2((score - maximum) * factor).
template <typename A>
inline void softmax_row(A* scores, int64_t columns, A factor, A& row_max, A& row_sum) {
  constexpr int64_t kLanes = Vec<A>::kSize;
  Vec<A> top = Vec<A>::broadcast(-std::numeric_limits<A>::infinity());
  for (int64_t column = 0; column < columns; column += kLanes) top = max(Vec<A>::load(scores + column), top);
  row_max = reduce_max(top);
  const Vec<A> offset = Vec<A>::broadcast(row_max < std::numeric_limits<A>::lowest() ? A(0) : row_max);
  const Vec<A> scale = Vec<A>::broadcast(factor);
  Vec<A> sum = Vec<A>::zero();
  for (int64_t column = 0; column < columns; column += kLanes) {
    const Vec<A> p = exp2(Vec<A>::load(scores + column) - offset, scale);
    p.store(scores + column);
    sum = sum + p;
  }
  row_sum = reduce_add(sum);
}

// The scores of one row and split become probabilities, not yet divided by their sum. `first` and `last` are the keys
// of the split; column 0 is the key `origin`.
template <typename T, typename A = Accumulate<T>>
void make_probabilities(const Scores<T>& terms, const Sample& sample, int64_t head,
                                                  int64_t row, int64_t origin, int64_t first, int64_t last, A* scores,
                                                  A* factors, A& row_max, A& row_sum) {
  const int64_t columns = round_up(last - origin, Vec<A>::kSize);
  if (terms.modified()) terms.modify(sample, head, row, origin, columns, scores, nullptr);
  mask_row(scores, 0, columns, std::max(sample.window.key_begin(row), first) - origin,
           std::min(sample.window.key_end_of(row), last) - origin, -std::numeric_limits<A>::infinity());
  if (terms.softmax()) {
    softmax_row(scores, columns, terms.scale().factor, row_max, row_sum);
  } else {
    terms.activate(scores, columns);
  }
  if (terms.drops()) {
    terms.dropout_factors(sample, head, row, origin, columns, factors);
    multiply_row(scores, factors, columns);
  }
}

template <typename T>
class DecodeTask {
 public:
  using A = Accumulate<T>;

  DecodeTask(const AttentionForward<T>& args, const Scores<T>& scores, const ProductTable<T>& products,
             std::byte* memory)
      : args_(args), sizes_(args.options.sizes), scores_(scores), products_(products), scratch_(memory, sizes_) {}

  // The keys [begin, end) of one split; parts: of the split's rows.
  void run(const Sample& sample, int64_t head_k, int64_t begin, int64_t end, const Part<A>& part, int64_t pitch) {
    const int64_t seqlen_q = sizes_.seqlen_q, rows = sizes_.group() * seqlen_q, first_head = head_k * sizes_.group();
    for (int64_t row = 0; row < products_.rows; ++row) {
      const T* query = row < rows ? args_.q.query(sample, first_head + row / seqlen_q, row % seqlen_q) : nullptr;
      products_.pack_query(query, sizes_.head_dim, scores_.scale().sign, row, scratch_.queries);
    }
    const int64_t origin = round_down(begin, Vec<A>::kSize);
    products_.multiply(scratch_.queries, score_runs(seqlen_q), args_.k.key(sample, head_k, origin), args_.k.seq_stride,
                       end - origin, sizes_.head_dim, scratch_.keys, scratch_.scores);
    for (int64_t row = 0; row < rows; ++row) {
      make_probabilities(scores_, sample, first_head + row / seqlen_q, row % seqlen_q, origin, begin, end,
                         scratch_.scores + row * kSplitPitch, scratch_.factors, part.row_max[row], part.row_sum[row]);
    }
    products_.add(scratch_.scores + begin - origin, args_.v.key(sample, head_k, begin), args_.v.seq_stride, end - begin,
                  sizes_.head_dim_v, part.out, pitch);
  }

 private:
  const AttentionForward<T>& args_;
  const AttentionSizes& sizes_;
  const Scores<T>& scores_;
  const ProductTable<T>& products_;
  Scratch<A> scratch_;
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

template <typename T>
void decode(const AttentionForward<T>& args, const ProductTable<T>& products) {
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
  const int64_t tasks = first_part[s.batch] * s.num_heads_k, part_size = products.rows * (pitch + 2);
  const Buffer<A> memory = allocate<A>(tasks * part_size);
  std::vector<Part<A>> parts(tasks);
  for (int64_t task = 0; task < tasks; ++task) {
    A* out = memory.get() + task * part_size;
    parts[task] = {out, out + products.rows * pitch, out + products.rows * (pitch + 1)};
  }
  const int64_t most = std::max<int64_t>(tasks, 1);
  const int threads = static_cast<int>(std::min<int64_t>(std::max(args.options.num_threads, 1), most));
  const int64_t scratch_bytes = Scratch<A>(nullptr, s).bytes;
  const Buffer<std::byte> scratch = allocate<std::byte>(threads * scratch_bytes);

#pragma omp parallel num_threads(threads)
  {
    DecodeTask<T> task(args, scores, products, scratch.get() + omp_get_thread_num() * scratch_bytes);
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
    using Table = ProductTable<T>;
    if (rows == 1) return decode(args, Table::template of<E, 1>());
    if (rows == 2) return decode(args, Table::template of<E, 2>());
    if (rows <= 4) return decode(args, Table::template of<E, 4>());
    if (rows <= 8 && kTileRows > 8) return decode(args, Table::template of<E, 8>());
    decode(args, Table::template of<E, kTileRows>());
  });
}

template void attention_decode<float>(const AttentionForward<float>&);
template void attention_decode<double>(const AttentionForward<double>&);
template void attention_decode<BFloat16>(const AttentionForward<BFloat16>&);
template void attention_decode<Float16>(const AttentionForward<Float16>&);

}  // namespace leedl
