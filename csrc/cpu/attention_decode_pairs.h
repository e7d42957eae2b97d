// The products of attention_decode_products.h for more than kDirectPairRows rows of bfloat16 numbers, as pairs (gemm.h).
//
// The rows make one panel, and keys meet it as they lie in memory: what is multiplied is K . Q^T, and only its small
// result is transposed. Values are paired on their way to the products. In vectors, the products of a key and its value
// take about as long as memory takes to bring them: both are called for in advance, a few lines at a time between the
// products, or else reading and multiplying would take turns.
#pragma once

#include "amx.h"
#include "attention_decode_products.h"

#if defined(__AVX512F__)

namespace leedl {

constexpr int64_t kRowsAhead = 64;  // of keys and values: they go to the second-level cache
constexpr int64_t kStepKeys = 64;   // of a step of P . V: their values stay in the first-level cache
constexpr int64_t kStepPairs = kStepKeys / 2;
constexpr int64_t kLinePairs = 64 / static_cast<int64_t>(sizeof(BFloat16Pair));  // of a cache line

// The memory of one thread.
struct PairMemory {
  BFloat16Pair* queries;  // [kTileSize][kHeadPitch]
  BFloat16Pair* columns;  // the same as a panel [depth][kTileSize]
  BFloat16Pair* keys;     // copies [2 * kTileSize][depth]
  BFloat16Pair* p;        // of a step [kTileSize][kStepPairs]
  BFloat16Pair* values;   // of a step on AMX, panels of [kStepPairs][kTileSize]
  float* sums;            // of AMX [2 * kTileSize][kTileSize]
  int64_t depth;          // pairs of a key, rounded up to kTileSize
  int64_t bytes;

  PairMemory(std::byte* base, const AttentionSizes& s)
      : depth(round_up(depth_of<BFloat16Pair>(s.head_dim), kTileSize)) {
    ByteArena arena(base);
    arena.take(queries, kTileSize * kHeadPitch);
    arena.take(columns, depth * kTileSize);
    arena.take(keys, 2 * kTileSize * depth);
    arena.take(p, kTileSize * kStepPairs);
    arena.take(values, kStepPairs * round_up(s.head_dim_v, kTileSize));
    arena.take(sums, 2 * kTileSize * kTileSize);
    bytes = arena.taken();
  }
};

// A number of each row.
template <bool kFew>
struct RowLanes {
  using Type = __m512;
};
template <>
struct RowLanes<true> {
  using Type = __m256;
};

// sums + the product of a key's pair and that of each query.
inline __attribute__((always_inline)) __m256 add_product(__m256 sums, __m256 queries, const BFloat16Pair* key) {
  asm("vdpbf16ps %2%{1to8%}, %1, %0" : "+v"(sums) : "v"(queries), "m"(*key));
  return sums;
}
inline __attribute__((always_inline)) __m512 add_product(__m512 sums, __m512 queries, const BFloat16Pair* key) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(queries), "m"(*key));
  return sums;
}

// scores[row][key] = keys[key][row], kTileSize of them.
template <int64_t kRows>
inline __attribute__((always_inline)) void store_transposed(const __m512* keys, float* scores) {
  Vec<float> rows[kTileSize];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTileSize; ++i) rows[i].lanes = keys[i];
  detail::transpose(rows);
#pragma GCC unroll 16
  for (int64_t row = 0; row < kRows; ++row) rows[row].store(scores + row * kSplitPitch);
}
template <int64_t kRows>
inline __attribute__((always_inline)) void store_transposed(const __m256* keys, float* scores) {
  Vec<float> rows[kTileSize / 2];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileSize / 2; ++i) {
    rows[i].lanes = _mm512_insertf32x8(_mm512_castps256_ps512(keys[2 * i]), keys[2 * i + 1], 1);
  }
  detail::transpose<float, kTileSize / 2>(rows);
#pragma GCC unroll 8
  for (int64_t row = 0; row < kRows; ++row) rows[row].store(scores + row * kSplitPitch);
}

// scores[row][key] = queries[row] . keys[key] for kTileSize keys, `stride` pairs apart; those that lie `ahead` keys
// further on are called for.
template <int64_t kRows>
__attribute__((noinline)) void multiply_keys_by_panel(const BFloat16Pair* queries, const BFloat16Pair* keys,
                                                      int64_t stride, int64_t depth, int64_t ahead, float* scores) {
  using Lanes = typename RowLanes<kRows <= 8>::Type;
  Lanes sums[kTileSize] = {};
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    if (k % kLinePairs == 0) {
#pragma GCC unroll 1
      for (int64_t i = 0; i < kTileSize; ++i) __builtin_prefetch(keys + (ahead + i) * stride + k, 0, 2);
    }
    Lanes query;
    std::memcpy(&query, queries + k * kTileSize, sizeof query);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTileSize; ++i) sums[i] = add_product(sums[i], query, keys + i * stride + k);
  }
  store_transposed<kRows>(sums, scores);
}

// Where number i of one vector and number i of another stand among the 64 numbers of both, for half of them.
constexpr std::array<uint16_t, 32> paired_words(int first) {
  std::array<uint16_t, 32> words{};
  for (int i = 0; i < 32; ++i) words[i] = static_cast<uint16_t>(first + i / 2 + i % 2 * 32);
  return words;
}

// Number i of `first` with number i of `second`, for the lower 16 numbers or the upper ones.
inline __attribute__((always_inline)) Vec<float> paired(__m512i first, __m512i second, bool upper) {
  alignas(64) static constexpr auto kLower = paired_words(0), kUpper = paired_words(16);
  const __m512i words = _mm512_load_si512(upper ? kUpper.data() : kLower.data());
  return {_mm512_castsi512_ps(_mm512_permutex2var_epi16(first, words, second))};
}

// out[row] += p[row] . values for up to kStepKeys values, `stride` apart, and their first `width` columns, at most kVecs
// vectors; those that lie `ahead` values further on are called for.
template <int64_t kRows, int64_t kVecs>
__attribute__((noinline)) void add_paired_values(const BFloat16Pair* p, const BFloat16* values, int64_t stride,
                                                 int64_t count, int64_t width, int64_t ahead, float* out,
                                                 int64_t pitch) {
  using Pair = Operand<BFloat16Pair>;
  Vec<float> acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int64_t vec = 0; vec < kVecs; ++vec) acc[row][vec] = Vec<float>::load(out + row * pitch + vec * kTileSize);
  }
  const auto add_two = [&](int64_t pair, int64_t second_width) __attribute__((always_inline)) {
    const BFloat16* from = values + 2 * pair * stride;
    __builtin_prefetch(from + ahead * stride, 0, 2);
    __builtin_prefetch(from + (ahead + 1) * stride, 0, 2);
    const __m512i first = detail::first_halves(from, width);
    const __m512i second = detail::first_halves(from + stride, second_width);
    Vec<float> columns[kVecs];
#pragma GCC unroll 2
    for (int64_t vec = 0; vec < kVecs; ++vec) columns[vec] = paired(first, second, vec);
#pragma GCC unroll 8
    for (int64_t row = 0; row < kRows; ++row) {
      const Vec<float> probability = Pair::broadcast(p + row * kStepPairs + pair);
#pragma GCC unroll 2
      for (int64_t vec = 0; vec < kVecs; ++vec) {
        acc[row][vec] = Pair::multiply_add(probability, columns[vec], acc[row][vec]);
      }
    }
  };
#pragma GCC unroll 1
  for (int64_t pair = 0; pair < count / 2; ++pair) add_two(pair, width);
  if (count % 2 != 0) add_two(count / 2, 0);
#pragma GCC unroll 8
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int64_t vec = 0; vec < kVecs; ++vec) acc[row][vec].store(out + row * pitch + vec * kTileSize);
  }
}

// The products of up to kRows_ rows, on AMX or in vectors.
template <int64_t kRows_, bool kAmx_>
struct PairProducts {
  using Memory = PairMemory;
  static constexpr int64_t kRows = kRows_;
  static constexpr bool kAmx = kAmx_;
  static_assert(!kAmx || kRows == kTileSize);

  static void pack_query(std::byte* base, const AttentionSizes& s, const BFloat16* query, float sign, int64_t row) {
    BFloat16Pair* to = Memory(base, s).queries + row * kHeadPitch;
    pack_rows<1, kHeadPitch>(to, query, 0, query != nullptr, s.head_dim, sign);
  }

  static void multiply(std::byte* base, const AttentionSizes& s, int64_t, const BFloat16* keys, int64_t stride,
                       int64_t count, float* scores) {
    constexpr int64_t kTogether = kAmx ? 2 * kTileSize : kTileSize;
    constexpr int64_t kNumbers = kAmx ? 2 * kTileSize : 2;  // that a key must have a multiple of to be read as it lies
    const Memory memory(base, s);
    pack_transposed(memory.columns, reinterpret_cast<const BFloat16*>(memory.queries), 2 * kHeadPitch, kRows,
                    s.head_dim, memory.depth);
    for (int64_t key = 0; key < count; key += kTogether) {
      const int64_t part = std::min(count - key, kTogether);
      const BFloat16* from = keys + key * stride;
      if (s.head_dim % kNumbers == 0 && stride % 2 == 0 && part == kTogether) {
        multiply_keys(memory, s, reinterpret_cast<const BFloat16Pair*>(from), stride / 2, part,
                      std::min(kRowsAhead, count - part - key), scores + key);
      } else {
        std::memset(memory.keys, 0, kTogether * memory.depth * sizeof(BFloat16Pair));
        for (int64_t i = 0; i < part; ++i) {
          std::memcpy(memory.keys + i * memory.depth, from + i * stride, s.head_dim * sizeof(BFloat16));
        }
        multiply_keys(memory, s, memory.keys, memory.depth, part, 0, scores + key);
      }
    }
  }

  // Probabilities that are not those of a key are not read, nor are values.
  static void add(std::byte* base, const AttentionSizes& s, float* p, const BFloat16* values, int64_t stride,
                  int64_t count, float* out, int64_t pitch) {
    const Memory memory(base, s);
    std::fill_n(out, kRows * pitch, 0.0f);
    for (int64_t key = 0; key < count; key += kStepKeys) {
      const int64_t part = std::min(kStepKeys, count - key);
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t i = 0; i < kStepKeys; i += 2 * kTileSize) {
          const auto load = [&](int64_t from) {
            return Vec<float>::load_first(p + row * kSplitPitch + key + from, std::clamp<int64_t>(part - from, 0, 16));
          };
          store_pairs(memory.p + row * kStepPairs + i / 2, load(i), load(i + kTileSize));
        }
      }
      const BFloat16* from = values + key * stride;
      if constexpr (kAmx) {
        add_values_on_amx(memory, s, from, stride, part, out, pitch);
      } else {
        add_values(memory, s, from, stride, part, std::min(kRowsAhead, count - part - key), out, pitch);
      }
    }
  }

 private:
  static void multiply_keys(const Memory& memory, const AttentionSizes& s, const BFloat16Pair* keys, int64_t stride,
                            int64_t count, [[maybe_unused]] int64_t ahead, float* scores) {
    if constexpr (kAmx) {
      multiply_on_amx(2 * kTileSize, memory.depth, {keys, stride}, {memory.columns, 0, kTileSize}, 1, false,
                      {memory.sums, kTileSize});
      for (int64_t key = 0; key < count; key += kTileSize) {
        __m512 sums[kTileSize];
        std::memcpy(sums, memory.sums + key * kTileSize, sizeof sums);
        store_transposed<kRows>(sums, scores + key);
      }
    } else {
      multiply_keys_by_panel<kRows>(memory.columns, keys, stride, depth_of<BFloat16Pair>(s.head_dim), ahead, scores);
    }
  }

  static void add_values_on_amx(const Memory& memory, const AttentionSizes& s, const BFloat16* values, int64_t stride,
                                int64_t count, float* out, int64_t pitch) {
    constexpr int64_t kPanel = kStepPairs * kTileSize;
    const int64_t pairs = depth_of<BFloat16Pair>(count), panels = pitch / kTileSize;
    pack_panels(memory.values, kPanel, values, stride, count, s.head_dim_v);
    for (int64_t panel = 0; panel < panels; ++panel) {  // tiles are read whole
      std::fill_n(memory.values + panel * kPanel + pairs * kTileSize, (round_up(pairs, kTileSize) - pairs) * kTileSize,
                  BFloat16Pair{});
    }
    multiply_on_amx(kRows, pairs, {memory.p, kStepPairs}, {memory.values, kPanel, kTileSize}, panels, true,
                    {out, pitch});
  }

  static void add_values(const Memory& memory, const AttentionSizes& s, const BFloat16* values, int64_t stride,
                         int64_t count, int64_t ahead, float* out, int64_t pitch) {
    constexpr int64_t kPart = kRows <= 8 ? kRows : kRows / 2;  // so that their sums fit into the registers
    for (int64_t row = 0; row < kRows; row += kPart) {
      for (int64_t column = 0; column < s.head_dim_v; column += 2 * kTileSize) {
        const int64_t width = std::min(s.head_dim_v - column, 2 * kTileSize);
        const auto add = width > kTileSize ? add_paired_values<kPart, 2> : add_paired_values<kPart, 1>;
        add(memory.p + row * kStepPairs, values + column, stride, count, width, ahead, out + row * pitch + column,
            pitch);
      }
    }
  }
};

}  // namespace leedl

#endif
