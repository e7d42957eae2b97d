// Dropout masks, a vector of Philox counters at a time, in the bits of philox.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "normal_simd.h"
#include "transpose.h"

namespace leedl {

// Element `column` of a row takes word column & 3 of the counter (column >> 2, word1, word2, stream) under the seed; a
// word below dropout_p * 2^32 drops it.
template <typename A>
class Dropout {
 public:
  Dropout(double dropout_p, uint64_t seed, uint32_t stream = kAttentionStream)
      : threshold_(static_cast<uint32_t>(dropout_p * 4294967296.0)),
        key0_(static_cast<uint32_t>(seed)),
        key1_(static_cast<uint32_t>(seed >> 32)),
        stream_(stream) {}

  // factors[c] = 0 or 1 for column first + c.
  void fill(int64_t first, int64_t count, int64_t word1, int64_t word2, A* factors) const {
    constexpr int64_t kColumns = 4 * kCounterLanes;
    int64_t column = first / 4 * 4;
    while (count > 0) {
      alignas(64) uint32_t words[kColumns];
      fill_words(column / 4, word1, word2, words);
      const int64_t skip = first - column, usable = std::min(count, kColumns - skip);
      for (int64_t i = 0; i < usable; ++i) factors[i] = A(words[skip + i] >= threshold_);
      column += kColumns;
      first += usable;
      factors += usable;
      count -= usable;
    }
  }

 private:
  void fill_words(int64_t block, int64_t word1, int64_t word2, uint32_t* words) const {
    using detail::merge_low, detail::multiply_low, detail::xor3;
    Counters c0, c1 = Counters{} + static_cast<uint32_t>(word1), c2 = Counters{} + static_cast<uint32_t>(word2),
                 c3 = Counters{} + stream_;
    for (int lane = 0; lane < kCounterLanes; ++lane) c0[lane] = static_cast<uint32_t>(block + lane);
    uint32_t key0 = key0_, key1 = key1_;
#pragma GCC unroll 16
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Counters product0 = multiply_low(c0, Counters{} + kPhiloxMultiplier0);
      const Counters product1 = multiply_low(c2, Counters{} + kPhiloxMultiplier1);
      c0 = xor3(product1 >> 32, c1, Counters{} + key0);
      c1 = product1;
      c2 = xor3(product0 >> 32, c3, Counters{} + key1);
      c3 = product0;
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
    // Two words to a lane, then lane after lane of both.
    Vec<double> low, high;
    detail::interleave(Vec<double>{reinterpret_cast<Vec<double>::Lanes>(merge_low(c0, c1))},
                       Vec<double>{reinterpret_cast<Vec<double>::Lanes>(merge_low(c2, c3))}, low, high,
                       std::make_index_sequence<kCounterLanes>());
    std::memcpy(words, &low, sizeof low);
    std::memcpy(words + 2 * kCounterLanes, &high, sizeof high);
  }

  uint32_t threshold_;
  uint32_t key0_, key1_;
  uint32_t stream_;
};

}  // namespace leedl
