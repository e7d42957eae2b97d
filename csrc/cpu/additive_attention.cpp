// Binds additive attention to Python. Arguments were checked there.
#include "additive_attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"

namespace leedl {
namespace {

// (batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v)
using Sizes = std::array<int64_t, 7>;
// (batch, head, seq) strides of each tensor, in elements.
template <size_t kTensors>
using Strides = std::array<int64_t, 3 * kTensors>;

template <typename T, size_t kSize>
HeadTensor<T> head_tensor(std::uintptr_t data, const std::array<int64_t, kSize>& strides, size_t index) {
  return {pointer<T>(data), strides[3 * index], strides[3 * index + 1], strides[3 * index + 2]};
}

AdditiveProblem make_problem(const Sizes& s, std::uintptr_t key_lengths, int64_t window_left, int64_t window_right,
                             int num_threads) {
  return {{s[0], s[1], s[2], s[3], s[4], s[5], s[6]}, pointer<const int64_t>(key_lengths), window_left, window_right,
          num_threads};
}

void forward(int dtype, std::uintptr_t out, std::uintptr_t row_max, std::uintptr_t row_sum, std::uintptr_t q,
             std::uintptr_t k, std::uintptr_t v, std::uintptr_t score_weight, std::uintptr_t key_lengths,
             const Sizes& sizes, const Strides<4>& strides, int64_t window_left, int64_t window_right,
             int num_threads) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    additive_attention_forward<T>({make_problem(sizes, key_lengths, window_left, window_right, num_threads),
                                   head_tensor<T>(out, strides, 0), pointer<A>(row_max), pointer<A>(row_sum),
                                   head_tensor<const T>(q, strides, 1), head_tensor<const T>(k, strides, 2),
                                   head_tensor<const T>(v, strides, 3), pointer<const T>(score_weight)});
  });
}

void backward(int dtype, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv, std::uintptr_t dscore_weight,
              std::uintptr_t dout, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t score_weight,
              std::uintptr_t key_lengths, std::uintptr_t out, std::uintptr_t row_max, std::uintptr_t row_sum,
              const Sizes& sizes, const Strides<8>& strides, int64_t window_left, int64_t window_right,
              int num_threads) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    additive_attention_backward<T>({make_problem(sizes, key_lengths, window_left, window_right, num_threads),
                                    head_tensor<T>(dq, strides, 0), head_tensor<T>(dk, strides, 1),
                                    head_tensor<T>(dv, strides, 2), pointer<A>(dscore_weight),
                                    head_tensor<const T>(dout, strides, 3), head_tensor<const T>(q, strides, 4),
                                    head_tensor<const T>(k, strides, 5), head_tensor<const T>(v, strides, 6),
                                    head_tensor<const T>(out, strides, 7), pointer<const T>(score_weight),
                                    pointer<const A>(row_max), pointer<const A>(row_sum)});
  });
}

}  // namespace

void bind_additive_attention(pybind11::module_& m) {
  using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("additive_attention_forward", &forward, ReleaseGil());
  m.def("additive_attention_backward", &backward, ReleaseGil());
}

}  // namespace leedl
