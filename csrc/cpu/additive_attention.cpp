// Additive attention for Python: from tensors and numbers to the arguments of the kernels.
#include "additive_attention.h"

#include "attention_tensors.h"
#include "entry_points.h"

namespace leedl::entry_points {

void additive_attention_forward(const Tensor& out, const Tensor& row_max, const Tensor& row_sum, const Tensor& q,
                                const Tensor& k, const Tensor& v, const Tensor& score_weight,
                                const Tensor& key_lengths, int64_t window_left, int64_t window_right,
                                int num_threads) {
  const AdditiveProblem problem = {attention_sizes(q, k, v), key_lengths.data<const int64_t>(), window_left,
                                   window_right, num_threads};
  dispatch(q.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    leedl::additive_attention_forward<T>({problem, head_tensor<T>(out), row_max.data<A>(), row_sum.data<A>(),
                                          head_tensor<const T>(q), head_tensor<const T>(k), head_tensor<const T>(v),
                                          score_weight.data<const T>()});
  });
}

void additive_attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dscore_weight,
                                 const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& score_weight, const Tensor& key_lengths, const Tensor& out,
                                 const Tensor& row_max, const Tensor& row_sum, int64_t window_left,
                                 int64_t window_right, int num_threads) {
  const AdditiveProblem problem = {attention_sizes(q, k, v), key_lengths.data<const int64_t>(), window_left,
                                   window_right, num_threads};
  dispatch(q.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    leedl::additive_attention_backward<T>(
        {problem, head_tensor<T>(dq), head_tensor<T>(dk), head_tensor<T>(dv), dscore_weight.data<A>(),
         head_tensor<const T>(dout), head_tensor<const T>(q), head_tensor<const T>(k), head_tensor<const T>(v),
         head_tensor<const T>(out), score_weight.data<const T>(), row_max.data<const A>(), row_sum.data<const A>()});
  });
}

}  // namespace leedl::entry_points
