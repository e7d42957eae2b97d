// Attention for Python: from tensors and numbers to the arguments of the kernels.
#include "attention.h"

#include "attention_tensors.h"
#include "dtypes.h"
#include "entry_points.h"

namespace leedl {
namespace {

AttentionOptions make_options(const AttentionSizes& sizes, const AttentionInputs& inputs, const Options& options) {
  const auto& [bias, sinks, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, seed] = inputs;
  const auto& [softmax_scale, window_left, window_right, normalizer, softcap, dropout_p, num_threads] = options;
  return {sizes,
          key_lengths.data<const int64_t>(),
          cu_seqlens_q.data<const int64_t>(),
          cu_seqlens_k.data<const int64_t>(),
          cu_seqlens_q ? cu_seqlens_q.size(0) - 1 : 0,
          softmax_scale,
          window_left,
          window_right,
          static_cast<Normalizer>(normalizer),
          softcap,
          dropout_p,
          seed.data<const int64_t>(),
          num_threads};
}

template <typename T>
ScoreTerms<T> make_terms(const AttentionInputs& inputs) {
  const auto& [bias, sinks, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, seed] = inputs;
  return {bias_tensor<const T>(bias), sinks.data<const Accumulate<T>>(), alibi_slopes.data<const Accumulate<T>>(),
          alibi_slopes.dimensions() == 2 ? alibi_slopes.size(1) : 0};
}

}  // namespace

namespace entry_points {

void attention_forward(const Tensor& out, const Tensor& lse, const Tensor& row_max, const Tensor& row_sum,
                       const Tensor& q, const Tensor& k, const Tensor& v, const AttentionInputs& inputs,
                       const Options& options) {
  dispatch(q.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    leedl::attention_forward<T>({make_options(attention_sizes(q, k, v), inputs, options), make_terms<T>(inputs),
                                 head_tensor<T>(out), lse.data<A>(), row_max.data<A>(), row_sum.data<A>(),
                                 head_tensor<const T>(q), head_tensor<const T>(k), head_tensor<const T>(v)});
  });
}

void attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dbias, const Tensor& dsinks,
                        const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const AttentionInputs& inputs, const Tensor& out, const Tensor& row_max, const Tensor& row_sum,
                        const Options& options) {
  dispatch(q.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::Type;
    using A = Accumulate<T>;
    leedl::attention_backward<T>({make_options(attention_sizes(q, k, v), inputs, options), make_terms<T>(inputs),
                                  head_tensor<T>(dq), head_tensor<T>(dk), head_tensor<T>(dv), bias_tensor<A>(dbias),
                                  dbias.numel(), dsinks.data<A>(), head_tensor<const T>(dout),
                                  head_tensor<const T>(q), head_tensor<const T>(k), head_tensor<const T>(v),
                                  head_tensor<const T>(out), row_max.data<const A>(), row_sum.data<const A>(),
                                  dlse.data<const A>()});
  });
}

}  // namespace entry_points
}  // namespace leedl
