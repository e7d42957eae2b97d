// Additive attention for Python: from addresses and numbers to the arguments of the kernels.
#include "additive_attention.h"

#include "entry_points.h"

namespace leedl {
namespace {

AdditiveProblem make_problem(const Sizes& s, std::uintptr_t key_lengths, int64_t window_left, int64_t window_right,
                             int num_threads) {
  return {{s[0], s[1], s[2], s[3], s[4], s[5], s[6]}, pointer<const int64_t>(key_lengths), window_left, window_right,
          num_threads};
}

}  // namespace

namespace entry_points {

void additive_attention_forward(int dtype, std::uintptr_t out, std::uintptr_t row_max, std::uintptr_t row_sum,
                                std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t score_weight,
                                std::uintptr_t key_lengths, const Sizes& sizes, const Strides<4>& strides,
                                int64_t window_left, int64_t window_right, int num_threads) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    leedl::additive_attention_forward<T>({make_problem(sizes, key_lengths, window_left, window_right, num_threads),
                                   head_tensor<T>(out, strides, 0), pointer<A>(row_max), pointer<A>(row_sum),
                                   head_tensor<const T>(q, strides, 1), head_tensor<const T>(k, strides, 2),
                                   head_tensor<const T>(v, strides, 3), pointer<const T>(score_weight)});
  });
}

void additive_attention_backward(int dtype, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv,
                                 std::uintptr_t dscore_weight, std::uintptr_t dout, std::uintptr_t q, std::uintptr_t k,
                                 std::uintptr_t v, std::uintptr_t score_weight, std::uintptr_t key_lengths,
                                 std::uintptr_t out, std::uintptr_t row_max, std::uintptr_t row_sum, const Sizes& sizes,
                                 const Strides<8>& strides, int64_t window_left, int64_t window_right,
                                 int num_threads) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    leedl::additive_attention_backward<T>({make_problem(sizes, key_lengths, window_left, window_right, num_threads),
                                    head_tensor<T>(dq, strides, 0), head_tensor<T>(dk, strides, 1),
                                    head_tensor<T>(dv, strides, 2), pointer<A>(dscore_weight),
                                    head_tensor<const T>(dout, strides, 3), head_tensor<const T>(q, strides, 4),
                                    head_tensor<const T>(k, strides, 5), head_tensor<const T>(v, strides, 6),
                                    head_tensor<const T>(out, strides, 7), pointer<const T>(score_weight),
                                    pointer<const A>(row_max), pointer<const A>(row_sum)});
  });
}

}  // namespace entry_points
}  // namespace leedl
