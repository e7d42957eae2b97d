// Numbers in memory, of dtype T, and in registers, where they are float.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtypes.h"
#include "instructions.h"

namespace leedl {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 x) { return float_of_float16(x.bits); }

// Two numbers of T, which has two bytes, as one word.
template <typename T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  return std::is_same_v<T, BFloat16> ? bfloat16_pair(low, high) : float16_pair(low, high);
}

// x rounded to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return T{static_cast<uint16_t>(pair_of<T>(x, 0.0f))};
  }
}

// x as it will be read once it was stored.
template <typename T>
__device__ __forceinline__ float rounded_to(float x) {
  return to_float(from_float<T>(x));
}

// 16 bytes hold so many.
template <typename T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

// kCount numbers that lie one after another at an address that is a multiple of their size, 4 to 32 bytes.
template <int kCount, typename T>
__device__ __forceinline__ void load_aligned(const T* from, float (&to)[kCount]) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static_assert(kBytes % 4 == 0);
  uint32_t words[kBytes / 4];
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 vector = load_vector(reinterpret_cast<const uint4*>(from) + i);
      words[4 * i] = vector.x;
      words[4 * i + 1] = vector.y;
      words[4 * i + 2] = vector.z;
      words[4 * i + 3] = vector.w;
    }
  } else if constexpr (kBytes == 8) {
    const uint2 vector = *reinterpret_cast<const uint2*>(from);
    words[0] = vector.x;
    words[1] = vector.y;
  } else {
    static_assert(kBytes == 4);
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kIsTwoBytes<T>) {
      to[i] = to_float(T{static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))});
    } else {
      to[i] = __uint_as_float(words[i]);
    }
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void store_aligned(const float (&from)[kCount], T* to) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static_assert(kBytes % 4 == 0);
  uint32_t words[kBytes / 4];
#pragma unroll
  for (int i = 0; i < kBytes / 4; ++i) {
    if constexpr (kIsTwoBytes<T>) {
      words[i] = pair_of<T>(from[2 * i], from[2 * i + 1]);
    } else {
      words[i] = __float_as_uint(from[i]);
    }
  }
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 vector = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
      store_vector(reinterpret_cast<uint4*>(to) + i, vector);
    }
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
    static_assert(kBytes == 4);
    *reinterpret_cast<uint32_t*>(to) = words[0];
  }
}

// The first `count` of kCount numbers at any address, zeros behind them; all at once where is_aligned.
template <int kCount, typename T>
__device__ __forceinline__ void load(const T* from, int64_t count, bool is_aligned, float (&to)[kCount]) {
  if (is_aligned && count >= kCount) {
    load_aligned(from, to);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void store(const float (&from)[kCount], int64_t count, bool is_aligned, T* to) {
  if (is_aligned && count >= kCount) {
    store_aligned(from, to);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) to[i] = from_float<T>(from[i]);
    }
  }
}

// Calls body(Tag<T>()) for the type of `dtype`, which is not float64.
template <typename Body>
inline void dispatch_to_float(DType dtype, const Body& body) {
  dispatch(dtype, [&](auto tag) {
    if constexpr (!std::is_same_v<typename decltype(tag)::Type, double>) body(tag);
  });
}

}  // namespace leedl
