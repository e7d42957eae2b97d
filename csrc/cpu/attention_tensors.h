// The arguments of attention and of additive attention, made of tensors.
#pragma once

#include "attention.h"
#include "tensors.h"

namespace leedl {

inline AttentionSizes attention_sizes(const Tensor& q, const Tensor& k, const Tensor& v) {
  return {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3)};
}

template <typename T>
inline HeadTensor<T> head_tensor(const Tensor& tensor) {
  return {tensor.data<T>(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Of four dimensions or none.
template <typename T>
inline BiasTensor<T> bias_tensor(const Tensor& tensor) {
  if (!tensor) return {};
  const auto stride = [&](int dimension) { return tensor.size(dimension) == 1 ? 0 : tensor.stride(dimension); };
  return {tensor.data<T>(), stride(0), stride(1), stride(2)};
}

}  // namespace leedl
