// Attention for Python: from addresses and numbers to the arguments of the kernels.
#include "attention.h"

#include <array>
#include <tuple>

#include "dtypes.h"
#include "entry_points.h"

namespace leedl {
namespace {

AttentionOptions make_options(const Sizes& s, const Pointers& pointers, const Options& options) {
  const auto& [num_threads, num_sequences, softmax_scale, window_left, window_right, normalizer, softcap, dropout_p,
               bias_strides, alibi_stride] = options;
  return {{s[0], s[1], s[2], s[3], s[4], s[5], s[6]},
          pointer<const int64_t>(pointers[3]),
          pointer<const int64_t>(pointers[4]),
          pointer<const int64_t>(pointers[5]),
          num_sequences,
          softmax_scale,
          window_left,
          window_right,
          static_cast<Normalizer>(normalizer),
          softcap,
          dropout_p,
          pointer<const int64_t>(pointers[6]),
          num_threads};
}

template <typename T>
ScoreTerms<T> make_terms(const Pointers& pointers, const Options& options) {
  const std::array<int64_t, 3>& strides = std::get<8>(options);
  return {{pointer<const T>(pointers[0]), strides[0], strides[1], strides[2]},
          pointer<const Accumulate<T>>(pointers[1]),
          pointer<const Accumulate<T>>(pointers[2]),
          std::get<9>(options)};
}

}  // namespace

namespace entry_points {

void attention_forward(int dtype, std::uintptr_t out, std::uintptr_t lse, std::uintptr_t row_max,
                       std::uintptr_t row_sum, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v,
                       const Pointers& pointers, const Sizes& sizes, const Strides<4>& strides,
                       const Options& options) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    leedl::attention_forward<T>({make_options(sizes, pointers, options), make_terms<T>(pointers, options),
                          head_tensor<T>(out, strides, 0), pointer<A>(lse), pointer<A>(row_max), pointer<A>(row_sum),
                          head_tensor<const T>(q, strides, 1), head_tensor<const T>(k, strides, 2),
                          head_tensor<const T>(v, strides, 3)});
  });
}

void attention_backward(int dtype, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv, std::uintptr_t dbias,
                        std::uintptr_t dsinks, std::uintptr_t dout, std::uintptr_t dlse, std::uintptr_t q,
                        std::uintptr_t k, std::uintptr_t v, std::uintptr_t out, std::uintptr_t row_max,
                        std::uintptr_t row_sum, const Pointers& pointers, const Sizes& sizes, const Strides<8>& strides,
                        const std::array<int64_t, 4>& dbias_strides_and_size, const Options& options) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    const std::array<int64_t, 4>& d = dbias_strides_and_size;
    leedl::attention_backward<T>({make_options(sizes, pointers, options), make_terms<T>(pointers, options),
                           head_tensor<T>(dq, strides, 0), head_tensor<T>(dk, strides, 1),
                           head_tensor<T>(dv, strides, 2), {pointer<A>(dbias), d[0], d[1], d[2]}, d[3],
                           pointer<A>(dsinks), head_tensor<const T>(dout, strides, 3),
                           head_tensor<const T>(q, strides, 4), head_tensor<const T>(k, strides, 5),
                           head_tensor<const T>(v, strides, 6), head_tensor<const T>(out, strides, 7),
                           pointer<const A>(row_max), pointer<const A>(row_sum), pointer<const A>(dlse)});
  });
}

}  // namespace entry_points
}  // namespace leedl
