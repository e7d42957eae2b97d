// Vectors of float and double, as wide as the instruction set that this copy of the module is compiled for.
//
// The generic code uses GCC's vector extensions and runs everywhere; intrinsics stand only where those extensions have
// no name for an instruction. Nothing here depends on the order in which threads run: every reduction has a fixed tree.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dtypes.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace leedl {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
constexpr int64_t kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
constexpr int64_t kVectorRegisters = 16;
#else
constexpr int64_t kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int64_t kVectorRegisters = 32;
#else
constexpr int64_t kVectorRegisters = 16;
#endif
#endif

constexpr double kLog2e = 1.44269504088896340735992468100189214;

// The bits of numbers, one to a 32-bit lane, and of as many two-byte numbers.
typedef int32_t WordLanes __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfLanes __attribute__((vector_size(kVectorBytes / 2)));

namespace detail {

typedef float FloatLanes __attribute__((vector_size(kVectorBytes)));

// __builtin_convertvector(bits, WordLanes) and back, of words below 2^16; GCC 12 makes seven instructions of the former
// where there is one.
inline WordLanes words_of(HalfLanes bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<WordLanes>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)));
#else
  return __builtin_convertvector(bits, WordLanes);
#endif
}
inline HalfLanes halves_of(WordLanes words) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfLanes>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words)));
#else
  return __builtin_convertvector(words, HalfLanes);
#endif
}

inline FloatLanes widen(HalfLanes bits, BFloat16) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // The load repeats the halves, so that one shuffle within its two parts puts each on top of its lane.
  const __m256i twice = _mm256_broadcastsi128_si256(reinterpret_cast<__m128i>(bits));
  const __m256i order = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return reinterpret_cast<FloatLanes>(_mm256_shuffle_epi8(twice, order));
#else
  return reinterpret_cast<FloatLanes>(words_of(bits) << 16);
#endif
}

// Rounds to nearest even, subnormal numbers too (which the processors' own instruction takes for 0).
inline HalfLanes narrow(FloatLanes x, BFloat16) {
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  const Words bits = reinterpret_cast<Words>(x), high = bits >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const Words rounded = bits + 0x7fff + (high & 1);
  const __m256i words = reinterpret_cast<__m256i>(x == x ? rounded : bits | 0x400000);  // a NaN stays one
  // Either part of the vector puts its upper halves where they belong.
  const __m256i order = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         -1, -1, -1, -1, -1, -1, -1, -1, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i halves = _mm256_shuffle_epi8(words, order);
  return reinterpret_cast<HalfLanes>(_mm_or_si128(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
#else
  const Words rounded = (bits + 0x7fff + (high & 1)) >> 16;
  return halves_of(reinterpret_cast<WordLanes>(x == x ? rounded : high | 0x40));  // a NaN stays one
#endif
}

#if defined(__AVX512F__)
inline FloatLanes widen(HalfLanes bits, Float16) { return _mm512_cvtph_ps(reinterpret_cast<__m256i>(bits)); }
inline HalfLanes narrow(FloatLanes x, Float16) {
  return reinterpret_cast<HalfLanes>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline FloatLanes widen(HalfLanes bits, Float16) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)); }
inline HalfLanes narrow(FloatLanes x, Float16) {
  return reinterpret_cast<HalfLanes>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// float16 has 5 bits of exponent with a bias of 15 and 10 of mantissa, float 8 with a bias of 127 and 23: the mantissas
// stand 13 bits apart.
inline FloatLanes widen(HalfLanes half, Float16) {
  const WordLanes bits = __builtin_convertvector(half, WordLanes);
  const WordLanes magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const WordLanes normal = magnitude + ((127 - 15) << 23), special = magnitude + ((255 - 31) << 23);
  // A subnormal number is its mantissa times 2^-24: an offset of 2^-14 makes a normal number out of it, exactly.
  const WordLanes offset = WordLanes{} + ((127 - 14) << 23);
  const FloatLanes subnormal = reinterpret_cast<FloatLanes>(magnitude + offset) - reinterpret_cast<FloatLanes>(offset);
  const WordLanes finite = magnitude < (1 << 23) ? reinterpret_cast<WordLanes>(subnormal) : normal;
  return reinterpret_cast<FloatLanes>((magnitude < (31 << 23) ? finite : special) | sign);
}

inline HalfLanes narrow(FloatLanes x, Float16) {
  const WordLanes bits = reinterpret_cast<WordLanes>(x), magnitude = bits & 0x7fffffff;
  // Rounded to nearest even where 13 bits fall off; what carries beyond the largest number is infinity's bits.
  const WordLanes normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 2^-1 leaves multiples of 2^-24, what subnormal numbers are made of, rounded by the addition itself.
  const WordLanes offset = WordLanes{} + ((127 - 1) << 23);
  const WordLanes subnormal =
      reinterpret_cast<WordLanes>(reinterpret_cast<FloatLanes>(magnitude) + reinterpret_cast<FloatLanes>(offset)) -
      offset;
  const WordLanes finite = magnitude < ((127 - 14) << 23) ? subnormal : normal;
  const WordLanes infinity = WordLanes{} + 0x7c00, nan = WordLanes{} + 0x7e00;
  const WordLanes special = magnitude > (255 << 23) ? nan : infinity;
  const WordLanes half = magnitude < ((127 + 16) << 23) ? finite : special;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), HalfLanes);
}
#endif

}  // namespace detail

template <typename T>
struct Vec {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "Vec holds float or double");
  static constexpr int64_t kSize = kVectorBytes / static_cast<int64_t>(sizeof(T));
  // typedef, since a using declaration ignores the attribute on a dependent type.
  typedef T Lanes __attribute__((vector_size(kVectorBytes)));
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Integer Bits __attribute__((vector_size(kVectorBytes)));

  Lanes lanes;

  static Vec zero() { return {Lanes{}}; }
  static Vec broadcast(T x) { return {x - Lanes{}}; }  // x - 0 keeps the sign of -0; 0 + x would not

  static Vec load(const T* p) {
    Vec v;
    std::memcpy(&v.lanes, p, sizeof(Lanes));
    return v;
  }
  void store(T* p) const { std::memcpy(p, &lanes, sizeof(Lanes)); }
  // The same past the caches, which need not read the line first; p is aligned to the vector.
  void stream(T* p) const {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(lanes));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(lanes));
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(lanes));
#else
    store(p);
#endif
  }

  // The first n lanes (0 <= n <= kSize); the other lanes are 0, and their memory is not touched.
  static Vec load_first(const T* p, int64_t n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
    } else {
      return {_mm512_maskz_loadu_pd(first_lanes(n), p)};
    }
#else
    Vec v = zero();
    std::memcpy(&v.lanes, p, n * sizeof(T));
    return v;
#endif
  }
  void store_first(T* p, int64_t n) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_ps(p, first_lanes(n), lanes);
    } else {
      _mm512_mask_storeu_pd(p, first_lanes(n), lanes);
    }
#else
    std::memcpy(p, &lanes, n * sizeof(T));
#endif
  }

  // Two-byte numbers, of Vec<float> alone: exact as they are loaded, rounded to nearest even as they are stored.
  template <typename Half, typename = std::enable_if_t<kIsTwoBytes<Half>>>
  static Vec load(const Half* p) {
    HalfLanes bits;
    std::memcpy(&bits, p, sizeof bits);
    return {detail::widen(bits, Half())};
  }
  template <typename Half, typename = std::enable_if_t<kIsTwoBytes<Half>>>
  void store(Half* p) const {
    const HalfLanes bits = detail::narrow(lanes, Half());
    std::memcpy(p, &bits, sizeof bits);
  }
  template <typename Half, typename = std::enable_if_t<kIsTwoBytes<Half>>>
  void stream(Half* p) const {
    [[maybe_unused]] const HalfLanes bits = detail::narrow(lanes, Half());
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(bits));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(bits));
#else
    std::memcpy(p, &bits, sizeof bits);
#endif
  }
  template <typename Half, typename = std::enable_if_t<kIsTwoBytes<Half>>>
  static Vec load_first(const Half* p, int64_t n) {
    HalfLanes bits{};
#if defined(__AVX512F__)
    bits = reinterpret_cast<HalfLanes>(_mm256_maskz_loadu_epi16(first_lanes(n), p));
#else
    std::memcpy(&bits, p, n * sizeof(Half));
#endif
    return {detail::widen(bits, Half())};
  }
  template <typename Half, typename = std::enable_if_t<kIsTwoBytes<Half>>>
  void store_first(Half* p, int64_t n) const {
    const HalfLanes bits = detail::narrow(lanes, Half());
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, first_lanes(n), reinterpret_cast<__m256i>(bits));
#else
    std::memcpy(p, &bits, n * sizeof(Half));
#endif
  }

  // The lanes as numbers of type Stored hold them.
  template <typename Stored>
  Vec rounded_to() const {
    if constexpr (kIsTwoBytes<Stored>) {
      return {detail::widen(detail::narrow(lanes, Stored()), Stored())};
    } else {
      return *this;
    }
  }

  friend Vec operator+(Vec a, Vec b) { return {a.lanes + b.lanes}; }
  friend Vec operator-(Vec a, Vec b) { return {a.lanes - b.lanes}; }
  friend Vec operator*(Vec a, Vec b) { return {a.lanes * b.lanes}; }
  friend Vec operator/(Vec a, Vec b) { return {a.lanes / b.lanes}; }
  friend Vec operator-(Vec a) { return {-a.lanes}; }

#if defined(__AVX512F__)
 private:
  static auto first_lanes(int64_t n) {
    if constexpr (sizeof(T) == 4) {
      return static_cast<__mmask16>((1u << n) - 1);
    } else {
      return static_cast<__mmask8>((1u << n) - 1);
    }
  }
#endif
};

// Orders streamed stores before what other threads are told next.
inline void end_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// a * b + c with one rounding on every machine; slow where the instruction set has no fma (baseline x86-64).
template <typename T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)};
  } else {
    return {_mm512_fmadd_pd(a.lanes, b.lanes, c.lanes)};
  }
#elif defined(__FMA__)
  if constexpr (sizeof(T) == 4) {
    return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)};
  } else {
    return {_mm256_fmadd_pd(a.lanes, b.lanes, c.lanes)};
  }
#elif defined(__aarch64__) && defined(__ARM_NEON)
  if constexpr (sizeof(T) == 4) {
    return {vfmaq_f32(c.lanes, a.lanes, b.lanes)};
  } else {
    return {vfmaq_f64(c.lanes, a.lanes, b.lanes)};
  }
#else
  for (int64_t i = 0; i < Vec<T>::kSize; ++i) c.lanes[i] = std::fma(a.lanes[i], b.lanes[i], c.lanes[i]);
  return c;
#endif
}

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

// a * b + c, as fast as the instruction set does it: one rounding where it has fma, two where it has not.
template <typename T>
inline Vec<T> mul_add(Vec<T> a, Vec<T> b, Vec<T> c) {
  if constexpr (kHasFma) {
    return fma(a, b, c);
  } else {
    return a * b + c;
  }
}

// a > b ? a : b, so that the result is b where either is NaN.
template <typename T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)  // masked forms with a full mask: GCC 12 warns about its own unmasked ones
  if constexpr (sizeof(T) == 4) {
    return {_mm512_mask_max_ps(a.lanes, 0xffff, a.lanes, b.lanes)};
  } else {
    return {_mm512_mask_max_pd(a.lanes, 0xff, a.lanes, b.lanes)};
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return {_mm256_max_ps(a.lanes, b.lanes)};
  } else {
    return {_mm256_max_pd(a.lanes, b.lanes)};
  }
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) {
    return {_mm_max_ps(a.lanes, b.lanes)};
  } else {
    return {_mm_max_pd(a.lanes, b.lanes)};
  }
#else
  return {a.lanes > b.lanes ? a.lanes : b.lanes};
#endif
}

// a < b ? a : b, so that the result is b where either is NaN.
template <typename T>
inline Vec<T> min(Vec<T> a, Vec<T> b) {
  return -max(-a, -b);
}

namespace detail {

template <typename T, size_t... kLane>
inline typename Vec<T>::Bits lane_numbers(std::index_sequence<kLane...>) {
  return typename Vec<T>::Bits{static_cast<typename Vec<T>::Integer>(kLane)...};
}

}  // namespace detail

// x in the lanes [first, last), `otherwise` in the others; both bounds may lie outside of the vector.
template <typename T>
inline Vec<T> keep_lanes(int64_t first, int64_t last, Vec<T> x, Vec<T> otherwise) {
  using Integer = typename Vec<T>::Integer;
  const auto lane = detail::lane_numbers<T>(std::make_index_sequence<Vec<T>::kSize>());
  x.lanes = lane < static_cast<Integer>(last) ? x.lanes : otherwise.lanes;
  x.lanes = lane < static_cast<Integer>(first) ? otherwise.lanes : x.lanes;
  return x;
}

namespace detail {

// Combines lane i with lane i + kHalf, then the lower lanes alike. Shuffles, since lanes whose address is taken make GCC
// keep them in memory, where every turn of a loop that sums them waits for its own store.
template <int64_t kHalf, typename T, typename Combine, size_t... kLane>
inline __attribute__((always_inline)) T reduce(Vec<T> x, Combine combine, std::index_sequence<kLane...> lanes) {
  if constexpr (kHalf == 0) {
    return x.lanes[0];
  } else {
    using Bits = typename Vec<T>::Bits;
    const Vec<T> upper{__builtin_shuffle(x.lanes, Bits{static_cast<typename Vec<T>::Integer>(kLane ^ kHalf)...})};
    return reduce<kHalf / 2>(Vec<T>{combine(x.lanes, upper.lanes)}, combine, lanes);
  }
}

}  // namespace detail

// The sum of all lanes, always by the same tree: lane i with lane i + half, and so on.
template <typename T>
inline T reduce_add(Vec<T> x) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  return detail::reduce<kLanes / 2>(x, [](auto a, auto b) { return a + b; }, std::make_index_sequence<kLanes>());
}

// The largest lane; NaN lanes are passed over unless they meet in the last position.
template <typename T>
inline T reduce_max(Vec<T> x) {
  constexpr int64_t kLanes = Vec<T>::kSize;
  return detail::reduce<kLanes / 2>(x, [](auto a, auto b) { return a > b ? a : b; }, std::make_index_sequence<kLanes>());
}

// y, but 0 in the lanes where x < lowest; lanes where x is NaN keep y.
template <typename T>
inline Vec<T> zero_below(Vec<T> x, T lowest, Vec<T> y) {
  return {x.lanes < Vec<T>::broadcast(lowest).lanes ? Vec<T>::zero().lanes : y.lanes};
}

}  // namespace leedl
