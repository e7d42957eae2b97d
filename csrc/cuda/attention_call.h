// Attention's kernels for Python: from tensors and numbers to their arguments, and their launches.
#pragma once

#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "attention_products.h"

namespace leedl {

template <typename T>
inline Heads<T> heads(const Tensor& x) {
  return {x.data<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

// Whether all rows, of numbers of two bytes, begin at multiples of 16 bytes; rows beyond the last one, too, from which
// nothing is copied.
inline bool rows_are_aligned(std::initializer_list<Tensor> tensors) {
  for (const Tensor& x : tensors) {
    if (x.address() % 16 != 0) return false;
    for (int i = 0; i < 3; ++i) {
      if ((x.size(i) > 1 || i == 2) && x.stride(i) % kChunk != 0) return false;
    }
  }
  return true;
}

inline AttentionCall make_call(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionInputs& inputs,
                               const AttentionOptions& options) {
  const auto& [sinks, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k] = inputs;
  const auto& [softmax_scale, window_left, window_right] = options;
  AttentionCall call = {};
  call.num_heads = static_cast<int>(q.size(1));
  call.group = static_cast<int>(q.size(1) / std::max<int64_t>(k.size(1), 1));
  call.head_dim = static_cast<int>(q.size(3));
  call.head_dim_v = static_cast<int>(v.size(3));
  call.seqlen_q = static_cast<int>(q.size(2));
  call.seqlen_k = static_cast<int>(k.size(2));
  const auto cut = [](int64_t side) { return static_cast<int>(std::min<int64_t>(side, kMaxSeqlen)); };
  call.window_left = cut(window_left);
  call.window_right = cut(window_right);
  call.softmax_scale = static_cast<float>(softmax_scale);
  // A positive scale alone is folded into the exponents' factor.
  const double log2_e = std::log2(std::exp(1.0));
  const float folded = static_cast<float>(softmax_scale * log2_e);
  call.changes_scores = alibi_slopes || !(std::isnormal(folded) && folded > 0.0f);
  call.factor = call.changes_scores ? static_cast<float>(log2_e) : folded;
  call.score_scale = call.softmax_scale;
  call.sinks = sinks.data<const float>();
  call.alibi_slopes = alibi_slopes.data<const float>();
  call.alibi_stride_b = alibi_slopes.dimensions() == 2 ? alibi_slopes.size(1) : 0;
  call.key_lengths = key_lengths.data<const int64_t>();
  call.cu_seqlens_q = cu_seqlens_q.data<const int64_t>();
  call.cu_seqlens_k = cu_seqlens_k.data<const int64_t>();
  call.num_sequences = cu_seqlens_q ? static_cast<int>(cu_seqlens_q.size(0)) - 1 : 0;
  return call;
}

constexpr int kMostSharedBytes = 99 << 10;  // of a block, on compute capability 8.6, 8.9 and 12.0; others have more
constexpr int kSharedBytesOfAny = 48 << 10;
constexpr int kMaxHeadDim = 256, kMaxHeadDimBackward = 128;

template <int kDim, int kMaxDim, typename T, typename Body>
inline void dispatch_tile(Tag<T> tag, int head_dim, const Body& body) {
  if constexpr (kDim < kMaxDim) {
    if (head_dim > kDim) return dispatch_tile<2 * kDim, kMaxDim>(tag, head_dim, body);
  }
  body(tag, std::integral_constant<int, kDim>());
}

// Calls body(Tag<T>(), a constant) for a dtype of two bytes and the narrowest tile, up to kMaxDim, that holds head_dim.
template <int kMaxDim, typename Body>
inline void dispatch_tiles(DType dtype, int head_dim, const Body& body) {
  dispatch(dtype, [&](auto tag) {
    if constexpr (kIsTwoBytes<typename decltype(tag)::Type>) dispatch_tile<32, kMaxDim>(tag, head_dim, body);
  });
}

template <typename... Parameters, typename... Arguments>
inline void launch_tiles(const Stream& stream, void (*kernel)(Parameters...), int64_t blocks, int threads,
                         int shared_bytes, Arguments&&... arguments) {
  if (blocks == 0) return;
  // More than what every kernel may have must be asked for, on each device anew.
  if (shared_bytes > kSharedBytesOfAny) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  stream.launch(kernel, grid_size(blocks), threads, shared_bytes, std::forward<Arguments>(arguments)...);
}

}  // namespace leedl
