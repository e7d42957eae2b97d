// The dtypes of tensors: how Python names them, and how the two-byte ones become float and back.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace leedl {

// leedl_fast/backends/cpu.py has the same numbers.
enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Storage alone: numbers of these types are loaded as float and rounded when they are stored (simd.h).
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
constexpr bool kIsTwoBytes = std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>;

// What numbers of dtype T are computed and summed in.
template <typename T>
using Accumulate = std::conditional_t<kIsTwoBytes<T>, float, T>;

template <typename T>
struct Tag {
  using Type = T;
};

// Calls body(Tag<T>()) for the type of `dtype`.
template <typename Body>
inline void dispatch(int dtype, const Body& body) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32:
      return body(Tag<float>());
    case DType::kFloat64:
      return body(Tag<double>());
    case DType::kBFloat16:
      return body(Tag<BFloat16>());
    case DType::kFloat16:
      return body(Tag<Float16>());
  }
  throw std::invalid_argument("dtype must be the number of a DType, got " + std::to_string(dtype));
}

// The same for kernels that take float and double alone.
template <typename Body>
inline void dispatch_float(int dtype, const Body& body) {
  dispatch(dtype, [&](auto tag) {
    if constexpr (kIsTwoBytes<typename decltype(tag)::Type>) {
      throw std::invalid_argument("dtype must be float32 or float64");
    } else {
      body(tag);
    }
  });
}

// A tensor's data from its address, which is how Python hands it over.
template <typename T>
inline T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace leedl
