// The matrix products of attention for few queries (attention_decode.cpp): the scores of a split's keys, and the sum of
// its values.
//
// Memory is the limit: a core reads 6 bytes in a cycle, so that a key and its value, 64 bfloat16 numbers each, take 40
// cycles. It reads the keys of a split as kStreams streams side by side, which processors foresee better than one. Keys
// of few rows are multiplied as they lie, a vector of a key by a vector of the query, and sums are added up across lanes
// for a vector of keys at once; more rows than kDirectRows share the transposed keys.
#pragma once

#include "attention.h"

namespace leedl {

constexpr int64_t kSplitKeys = 1024;
constexpr int64_t kPackedKeys = 32;  // of one packing: they stay in the first-level cache
constexpr int64_t kDirectRows = 4;
constexpr int64_t kDirectPairRows = 2;  // of bfloat16 numbers that are multiplied as pairs
constexpr int64_t kStreams = 4;
constexpr int64_t kSplitPitch = kSplitKeys + 16;

// Vectors of accumulators beside each other for each row, so that there are enough of them to hide their latency.
constexpr int64_t tile_vecs(int64_t rows) {
  return std::clamp<int64_t>(kVectorRegisters / 2 / rows, 2, 8);
}

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

// The memory of one thread.
template <typename E>
struct VectorMemory {
  E* queries;  // [kTileRows][kHeadPitch]
  E* keys;     // [kPackedKeys / W] panels of [depth(head_dim)][W]
  int64_t bytes;

  VectorMemory(std::byte* base, const AttentionSizes& s) {
    ByteArena arena(base);
    arena.take(queries, kTileRows * kHeadPitch);
    arena.take(keys, kPackedKeys * depth_of<E>(s.head_dim));
    bytes = arena.taken();
  }
};

// The products of up to kRows_ rows, whose operands are of type E.
template <typename T, typename E, int64_t kRows_>
struct Products {
  using A = Accumulate<T>;
  using Memory = VectorMemory<E>;
  static constexpr int64_t kRows = kRows_;
  static constexpr bool kAmx = false;
  static constexpr int64_t kLanes = Vec<A>::kSize;

  static void pack_query(std::byte* base, const AttentionSizes& s, const T* query, A sign, int64_t row) {
    E* to = Memory(base, s).queries + row * kHeadPitch;
    std::fill_n(to, round_up(depth_of<E>(s.head_dim), kLanes), E{});  // multiply_keys reads whole vectors
    pack_rows<1, kHeadPitch>(to, query, 0, query != nullptr, s.head_dim, sign);
  }

  // scores[row][key] = q[row] . keys[key], the products of each summed in `runs` runs where keys are transposed.
  static void multiply(std::byte* base, const AttentionSizes& s, int64_t runs, const T* keys, int64_t stride,
                       int64_t count, A* scores) {
    const Memory memory(base, s);
    const E* q = memory.queries;
    if constexpr (kRows <= kDirectRows) {
      multiply_keys<E, kRows>(q, keys, stride, count, s.head_dim, scores);
    } else {
      E* panels = memory.keys;
      const int64_t depth = depth_of<E>(s.head_dim), run = (depth + runs - 1) / runs;
      for (int64_t key = 0; key < count; key += kPackedKeys) {
        const int64_t part = std::min(kPackedKeys, count - key);
        pack_transposed(panels, keys + key * stride, stride, part, s.head_dim);
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
  static void add(std::byte*, const AttentionSizes& s, A* p, const T* values, int64_t stride, int64_t count, A* out,
                  int64_t pitch) {
    const int64_t head_dim = s.head_dim_v;
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

}  // namespace leedl
