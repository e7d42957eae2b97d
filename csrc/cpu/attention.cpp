// Binds attention to Python. Arguments were checked there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "attention.h"
#include "bindings.h"
#include "dtypes.h"

namespace leedl {
namespace {

// (batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v)
using Sizes = std::array<int64_t, 7>;
// (batch, head, seq) strides of each tensor, in elements.
template <size_t kTensors>
using Strides = std::array<int64_t, 3 * kTensors>;

template <typename T, size_t kSize>
HeadTensor<T> head_tensor(std::uintptr_t data, const std::array<int64_t, kSize>& strides, size_t index) {
  return {reinterpret_cast<T*>(data), strides[3 * index], strides[3 * index + 1], strides[3 * index + 2]};
}

AttentionOptions make_options(std::uintptr_t key_lengths, const Sizes& s, double softmax_scale, int64_t window_left,
                              int64_t window_right, int num_threads) {
  return {{s[0], s[1], s[2], s[3], s[4], s[5], s[6]},
          reinterpret_cast<const int64_t*>(key_lengths),
          softmax_scale,
          window_left,
          window_right,
          num_threads};
}

void forward(int dtype, std::uintptr_t out, std::uintptr_t lse, std::uintptr_t row_max, std::uintptr_t row_sum,
             std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t key_lengths, const Sizes& sizes,
             const Strides<4>& strides, double softmax_scale, int64_t window_left, int64_t window_right,
             int num_threads) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    attention_forward<T>({make_options(key_lengths, sizes, softmax_scale, window_left, window_right, num_threads),
                          head_tensor<T>(out, strides, 0), pointer<T>(lse), pointer<T>(row_max), pointer<T>(row_sum),
                          head_tensor<const T>(q, strides, 1), head_tensor<const T>(k, strides, 2),
                          head_tensor<const T>(v, strides, 3)});
  });
}

void backward(int dtype, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv, std::uintptr_t dout,
              std::uintptr_t dlse, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t out,
              std::uintptr_t row_max, std::uintptr_t row_sum, std::uintptr_t key_lengths, const Sizes& sizes,
              const Strides<8>& strides, double softmax_scale, int64_t window_left, int64_t window_right,
              int num_threads) {
  dispatch_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    attention_backward<T>({make_options(key_lengths, sizes, softmax_scale, window_left, window_right, num_threads),
                           head_tensor<T>(dq, strides, 0), head_tensor<T>(dk, strides, 1),
                           head_tensor<T>(dv, strides, 2), head_tensor<const T>(dout, strides, 3),
                           head_tensor<const T>(q, strides, 4), head_tensor<const T>(k, strides, 5),
                           head_tensor<const T>(v, strides, 6), head_tensor<const T>(out, strides, 7),
                           pointer<const T>(row_max), pointer<const T>(row_sum), pointer<const T>(dlse)});
  });
}

}  // namespace

void bind_attention(pybind11::module_& m) {
  using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("attention_forward", &forward, ReleaseGil());
  m.def("attention_backward", &backward, ReleaseGil());
}

}  // namespace leedl
