// The dtypes of tensors, and the types that their numbers have here.
#pragma once

#include <cstdint>
#include <type_traits>

namespace leedl {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

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
inline void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Tag<float>());
    case DType::kFloat64:
      return body(Tag<double>());
    case DType::kBFloat16:
      return body(Tag<BFloat16>());
    case DType::kFloat16:
      return body(Tag<Float16>());
  }
}

}  // namespace leedl
