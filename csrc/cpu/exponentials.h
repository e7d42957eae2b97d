// 2^x and the natural logarithm of vectors.
#pragma once

#include "simd.h"

namespace leedl {

namespace detail {

// 2^r = 1 + r * (c[0] + r * (c[1] + ...)) on [-1/2, 1/2], minimax in the relative error (2.6e-9 and 1.8e-17), highest
// first.
template <typename T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float kCoefficients[] = {0x1.470b48e30bd6ep-13f,
                                            0x1.5f7276bfe7010p-10f,
                                            0x1.3b270e65d3126p-7f,
                                            0x1.c6ae72e0065ddp-5f,
                                            0x1.ebfbe2c53fd3dp-3f,
                                            0x1.62e43117337b0p-1f,
                                            1.0f};
  static constexpr float kRound = 0x1.8p23f + 127;  // x + kRound leaves round(x) + 127 in the lowest bits
  static constexpr int kExponentShift = 23;
  static constexpr float kLowest = -126.0f;
};

template <>
struct Exp2<double> {
  static constexpr double kCoefficients[] = {0x1.c063841f3a21dp-32, 0x1.e605f964b639dp-28, 0x1.b54167a1b0034p-24,
                                             0x1.62bfd49ededd3p-20, 0x1.ffcbee3b0a61cp-17, 0x1.43091309610fcp-13,
                                             0x1.5d87fe7bbbe09p-10, 0x1.3b2ab6fba1e1cp-7,  0x1.c6b08d7048f31p-5,
                                             0x1.ebfbdff82c598p-3,  0x1.62e42fefa39f3p-1,  1.0};
  static constexpr double kRound = 0x1.8p52 + 1023;
  static constexpr int kExponentShift = 52;
  static constexpr double kLowest = -1022.0;
};

// 2^(n + fraction), where n is the integer that the lowest bits of shifted hold.
template <typename T>
inline Vec<T> exp2_scaled(Vec<T> fraction, Vec<T> shifted) {
  using C = Exp2<T>;
  Vec<T> y = Vec<T>::broadcast(C::kCoefficients[0]);
#pragma GCC unroll 16
  for (size_t i = 1; i < sizeof(C::kCoefficients) / sizeof(T); ++i) {
    y = mul_add(y, fraction, Vec<T>::broadcast(C::kCoefficients[i]));
  }
  const auto scale = reinterpret_cast<typename Vec<T>::Bits>(shifted.lanes) << C::kExponentShift;
  return y * Vec<T>{reinterpret_cast<typename Vec<T>::Lanes>(scale)};
}

#if defined(__AVX512F__)

// 2^(x * scale) = 2^(n / 16) * 2^r: 2^(j / 16) comes from a table of one register, which leaves |r| <= 1/32 to three
// terms (minimax in the relative error, 1.6e-9). The processor does 1.5 of these operations in a cycle, so that fewer of
// them count for more than the chain they make.
inline Vec<float> exp2_from_table(Vec<float> x, Vec<float> scale) {
  constexpr int kShift = 23 - 4;
  // The bits of 2^(j / 16) without those that j itself leaves there as n goes to the exponent.
  static constexpr auto bits_of = [](uint32_t bits, uint32_t j) { return static_cast<int32_t>(bits - (j << kShift)); };
  const WordLanes table = {
      bits_of(0x3f800000, 0),  bits_of(0x3f85aac3, 1),  bits_of(0x3f8b95c2, 2),  bits_of(0x3f91c3d3, 3),
      bits_of(0x3f9837f0, 4),  bits_of(0x3f9ef532, 5),  bits_of(0x3fa5fed7, 6),  bits_of(0x3fad583f, 7),
      bits_of(0x3fb504f3, 8),  bits_of(0x3fbd08a4, 9),  bits_of(0x3fc5672a, 10), bits_of(0x3fce248c, 11),
      bits_of(0x3fd744fd, 12), bits_of(0x3fe0ccdf, 13), bits_of(0x3feac0c7, 14), bits_of(0x3ff5257d, 15)};
  constexpr float kRound = 0x1.8p19f;  // x + kRound leaves round(16 x) in the lowest bits
  const Vec<float> round = Vec<float>::broadcast(kRound), shifted = fma(x, scale, round);
  const Vec<float> r = fma(x, scale, round - shifted);
  const auto n = reinterpret_cast<WordLanes>(shifted.lanes);
  const Vec<float> power{reinterpret_cast<Vec<float>::Lanes>(__builtin_shuffle(table, n) + (n << kShift))};
  Vec<float> series = Vec<float>::broadcast(0x1.c6ac6ap-5f);
  series = fma(series, r, Vec<float>::broadcast(0x1.ebfff4p-3f));
  series = fma(series, r, Vec<float>::broadcast(0x1.62e430p-1f)) * r;
  // From the first n on whose powers are all normal numbers.
  return zero_below(shifted, kRound + Exp2<float>::kLowest + 1.0f / 16, fma(power, series, power));
}

#endif

}  // namespace detail

// 2^(x * scale) within about one ulp for products below 127.5 (double: 1023.5). Exactly 1 at 0; NaN stays NaN; exactly 0
// wherever the true value would be subnormal, -inf included: a subnormal factor makes each multiplication that meets it
// some hundred cycles long.
template <typename T>
inline Vec<T> exp2(Vec<T> x, Vec<T> scale) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return detail::exp2_from_table(x, scale);
#endif
  using C = detail::Exp2<T>;
  const Vec<T> product = x * scale, round = Vec<T>::broadcast(C::kRound);
  const Vec<T> shifted = product + round;
  return zero_below(product, C::kLowest, detail::exp2_scaled(product - (shifted - round), shifted));
}

template <typename T>
inline Vec<T> exp2(Vec<T> x) {
  return exp2(x, Vec<T>::broadcast(1));
}

// The natural logarithm within about one ulp, for positive normal x.
template <typename T>
inline Vec<T> log(Vec<T> x) {
  using Bits = typename Vec<T>::Bits;
  using Integer = typename Vec<T>::Integer;
  constexpr int kShift = detail::Exp2<T>::kExponentShift;
  constexpr Integer kHalfSqrt2 = static_cast<Integer>(sizeof(T) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd);
  constexpr int kTerms = sizeof(T) == 4 ? 4 : 10;
  constexpr T kLn2High = static_cast<T>(sizeof(T) == 4 ? 0x1.62e4p-1 : 0x1.62e42feep-1);
  constexpr T kLn2Low = static_cast<T>(0.693147180559945309417232121458176568L - static_cast<long double>(kLn2High));
  // x = mantissa * 2^exponent with sqrt(1/2) <= mantissa < sqrt(2), and log(mantissa) = 2 atanh((mantissa - 1) /
  // (mantissa + 1)).
  const Bits bits = reinterpret_cast<Bits>(x.lanes);
  const Bits exponent = (bits - kHalfSqrt2) >> kShift;
  const Vec<T> mantissa{reinterpret_cast<typename Vec<T>::Lanes>(bits - (exponent << kShift))};
  const Vec<T> n{__builtin_convertvector(exponent, typename Vec<T>::Lanes)};
  const Vec<T> one = Vec<T>::broadcast(1), f = mantissa - one;
  const Vec<T> t = f / (mantissa + one), t2 = t * t;
  Vec<T> series = Vec<T>::broadcast(T(1) / (2 * kTerms + 1));
#pragma GCC unroll 16
  for (int i = kTerms - 1; i > 0; --i) series = mul_add(series, t2, Vec<T>::broadcast(T(1) / (2 * i + 1)));
  // f - t * f is 2 t exactly but for rounding; taking f whole leaves the rounding to the small terms.
  const Vec<T> rest = mul_add(t * t2, series + series, n * Vec<T>::broadcast(kLn2Low)) - t * f;
  return mul_add(n, Vec<T>::broadcast(kLn2High), f + rest);
}

}  // namespace leedl
