// The functions of csrc/cuda/instructions.h, on the host.
#pragma once

#include "cuda_runtime.h"

namespace leedl {

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::shared_memory);
}

// Another address would end a kernel on the device.
inline uint4 load_vector(const void* from) {
  emulator::check_alignment(from, sizeof(uint4));
  return *static_cast<const uint4*>(from);
}

inline void store_vector(void* to, uint4 vector) {
  emulator::check_alignment(to, sizeof(vector));
  *static_cast<uint4*>(to) = vector;
}

inline uint32_t bfloat16_pair(float low, float high) {
  const auto rounded = [](float x) -> uint32_t {
    if (std::isnan(x)) return 0x7FFF;
    const uint32_t bits = __float_as_uint(x);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  };
  return rounded(high) << 16 | rounded(low);
}

inline uint32_t float16_pair(float low, float high) {
  const auto rounded = [](float x) -> uint32_t {
    const auto half = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof(bits));
    return bits;
  };
  return rounded(high) << 16 | rounded(low);
}

inline float float_of_float16(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof(half));
  return static_cast<float>(half);
}

}  // namespace leedl
