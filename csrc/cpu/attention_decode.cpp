// Attention, forward, for few queries, as when a model generates text: all queries that share a key head make one strip
// of at most kTileRows rows, or a few strips.
//
// A task owns one split of the keys of one key head: it reads the split's keys and values from memory once, for the
// strips after the first from the cache, and leaves a maximum, a sum and an output per row. Splits are combined in their order ("split-KV", Dao et al. 2023, Flash-Decoding). Where
// they lie depends on nothing but the position of a key.
#include "attention_decode_pairs.h"
#include "attention_output.h"

namespace leedl {
namespace {

// Otherwise every query head transposes the keys for itself, which costs as much as two strips of its own.
constexpr int64_t kMostStrips = 8;

// The products that were chosen for the rows and their operands: what calls them is compiled once.
template <typename T>
struct ProductTable {
  using A = Accumulate<T>;

  template <typename P>
  static ProductTable of() {
    return {P::kRows, P::kAmx, [](const AttentionSizes& s) { return typename P::Memory(nullptr, s).bytes; },
            P::pack_query, P::multiply, P::add};
  }

  int64_t rows;
  bool amx;
  int64_t (*memory_bytes)(const AttentionSizes&);
  void (*pack_query)(std::byte*, const AttentionSizes&, const T*, A, int64_t);
  void (*multiply)(std::byte*, const AttentionSizes&, int64_t, const T*, int64_t, int64_t, A*);
  void (*add)(std::byte*, const AttentionSizes&, A*, const T*, int64_t, int64_t, A*, int64_t);
};

// The memory of one thread.
template <typename T>
struct Scratch {
  std::byte* operands;     // of the products
  Accumulate<T>* scores;   // [products.rows][kSplitPitch]
  Accumulate<T>* factors;  // of dropout [kSplitPitch]
  int64_t bytes;

  Scratch(std::byte* base, const AttentionSizes& s, const ProductTable<T>& products) {
    ByteArena arena(base);
    arena.take(operands, products.memory_bytes(s));
    arena.take(scores, products.rows * kSplitPitch);
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
void make_probabilities(const Scores<T>& terms, const Sample& sample, int64_t head, int64_t row, int64_t origin,
                        int64_t first, int64_t last, A* scores, A* factors, A& row_max, A& row_sum) {
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
      : args_(args),
        sizes_(args.options.sizes),
        scores_(scores),
        products_(products),
        scratch_(memory, sizes_, products) {}

  // The keys [begin, end) of one split; part: of the split's rows.
  void run(const Sample& sample, int64_t head_k, int64_t begin, int64_t end, const Part<A>& part, int64_t pitch) {
    const int64_t rows = sizes_.group() * sizes_.seqlen_q;
    for (int64_t row = 0; row < rows; row += products_.rows) {
      const Part<A> strip = {part.out + row * pitch, part.row_max + row, part.row_sum + row};
      run_strip(sample, head_k, row, std::min(rows - row, products_.rows), begin, end, strip, pitch);
    }
  }

 private:
  // The rows [first, first + rows) of those that share the key head.
  void run_strip(const Sample& sample, int64_t head_k, int64_t first, int64_t rows, int64_t begin, int64_t end,
                 const Part<A>& part, int64_t pitch) {
    const int64_t seqlen_q = sizes_.seqlen_q, first_head = head_k * sizes_.group();
    const auto head = [&](int64_t row) { return first_head + (first + row) / seqlen_q; };
    const auto query = [&](int64_t row) { return (first + row) % seqlen_q; };
    for (int64_t row = 0; row < products_.rows; ++row) {
      const T* const from = row < rows ? args_.q.query(sample, head(row), query(row)) : nullptr;
      products_.pack_query(scratch_.operands, sizes_, from, scores_.scale().sign, row);
    }
    const int64_t origin = round_down(begin, Vec<A>::kSize);
    products_.multiply(scratch_.operands, sizes_, score_runs(seqlen_q), args_.k.key(sample, head_k, origin),
                       args_.k.seq_stride, end - origin, scratch_.scores);
    for (int64_t row = 0; row < rows; ++row) {
      make_probabilities(scores_, sample, head(row), query(row), origin, begin, end,
                         scratch_.scores + row * kSplitPitch, scratch_.factors, part.row_max[row], part.row_sum[row]);
    }
    products_.add(scratch_.operands, sizes_, scratch_.scores + begin - origin, args_.v.key(sample, head_k, begin),
                  args_.v.seq_stride, end - begin, part.out, pitch);
  }

  const AttentionForward<T>& args_;
  const AttentionSizes& sizes_;
  const Scores<T>& scores_;
  const ProductTable<T>& products_;
  Scratch<T> scratch_;
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
  const int64_t rows = round_up(s.group() * s.seqlen_q, products.rows);
  const int64_t tasks = first_part[s.batch] * s.num_heads_k, part_size = rows * (pitch + 2);
  const Buffer<A> memory = allocate<A>(tasks * part_size);
  std::vector<Part<A>> parts(tasks);
  for (int64_t task = 0; task < tasks; ++task) {
    A* out = memory.get() + task * part_size;
    parts[task] = {out, out + rows * pitch, out + rows * (pitch + 1)};
  }
  const int64_t most = std::max<int64_t>(tasks, 1);
  const int threads = static_cast<int>(std::min<int64_t>(std::max(args.options.num_threads, 1), most));
  const int64_t scratch_bytes = Scratch<T>(nullptr, s, products).bytes;
  const Buffer<std::byte> scratch = allocate<std::byte>(threads * scratch_bytes);

#pragma omp parallel num_threads(threads)
  {
    const TileRegisters registers(products.amx);
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

template <typename T, typename E, int64_t kRows>
ProductTable<T> products_of() {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<E, BFloat16Pair> && kRows > kDirectPairRows) {
    if (multiplies_on_amx()) return ProductTable<T>::template of<PairProducts<kTileSize, true>>();
    return ProductTable<T>::template of<PairProducts<kRows, false>>();
  } else
#endif
    return ProductTable<T>::template of<Products<T, E, kRows>>();
}

}  // namespace

bool attention_decodes(const AttentionOptions& options) {
  const AttentionSizes& s = options.sizes;
  if (options.packed() || s.num_heads_k == 0) return false;
  const int64_t strips = divide_up(s.group() * s.seqlen_q, kTileRows);
  return strips <= 1 || strips <= std::min(s.group() / 2, kMostStrips);
}

template <typename T>
void attention_decode(const AttentionForward<T>& args) {
  const int64_t rows = args.options.sizes.group() * args.options.sizes.seqlen_q;
  if (rows == 0 || args.options.sizes.batch == 0) return;
  const int64_t strip = divide_up(rows, divide_up(rows, kTileRows));  // as many rows in each of as few as there can be
  dispatch_operand<T>([&](auto tag) {
    using E = typename decltype(tag)::Type;
    if (strip == 1) return decode(args, products_of<T, E, 1>());
    if (strip == 2) return decode(args, products_of<T, E, 2>());
    if (strip <= 4) return decode(args, products_of<T, E, 4>());
    if (strip <= 8 && kTileRows > 8) return decode(args, products_of<T, E, 8>());
    decode(args, products_of<T, E, kTileRows>());
  });
}

template void attention_decode<float>(const AttentionForward<float>&);
template void attention_decode<double>(const AttentionForward<double>&);
template void attention_decode<BFloat16>(const AttentionForward<BFloat16>&);
template void attention_decode<Float16>(const AttentionForward<Float16>&);

}  // namespace leedl
