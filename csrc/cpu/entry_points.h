// What Python calls: functions of tensors, or of their addresses, sizes and strides, bound in module.cpp and defined
// beside their kernels. Dtypes are numbers of DType; the address 0, or a Tensor of None, stands for one that is absent.
// Arguments were checked in Python.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <tuple>

#include "tensors.h"

namespace leedl {

// Of attention: (batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v)
using Sizes = std::array<int64_t, 7>;
// (batch, head, seq) strides of each tensor, in elements.
template <size_t kTensors>
using Strides = std::array<int64_t, 3 * kTensors>;
using Pointers = std::array<std::uintptr_t, 7>;  // bias sinks alibi_slopes key_lengths cu_seqlens_q cu_seqlens_k seed
// num_threads, num_sequences, softmax_scale, window_left, window_right, normalizer, softcap, dropout_p, and the strides
// of bias along (batch, head, query) and of alibi_slopes along samples
using Options =
    std::tuple<int, int64_t, double, int64_t, int64_t, int, double, double, std::array<int64_t, 3>, int64_t>;

namespace entry_points {

void attention_forward(int dtype, std::uintptr_t out, std::uintptr_t lse, std::uintptr_t row_max,
                       std::uintptr_t row_sum, std::uintptr_t q, std::uintptr_t k, std::uintptr_t v,
                       const Pointers& pointers, const Sizes& sizes, const Strides<4>& strides, const Options& options);
void attention_backward(int dtype, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv, std::uintptr_t dbias,
                        std::uintptr_t dsinks, std::uintptr_t dout, std::uintptr_t dlse, std::uintptr_t q,
                        std::uintptr_t k, std::uintptr_t v, std::uintptr_t out, std::uintptr_t row_max,
                        std::uintptr_t row_sum, const Pointers& pointers, const Sizes& sizes, const Strides<8>& strides,
                        const std::array<int64_t, 4>& dbias_strides_and_size, const Options& options);

void additive_attention_forward(int dtype, std::uintptr_t out, std::uintptr_t row_max, std::uintptr_t row_sum,
                                std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t score_weight,
                                std::uintptr_t key_lengths, const Sizes& sizes, const Strides<4>& strides,
                                int64_t window_left, int64_t window_right, int num_threads);
void additive_attention_backward(int dtype, std::uintptr_t dq, std::uintptr_t dk, std::uintptr_t dv,
                                 std::uintptr_t dscore_weight, std::uintptr_t dout, std::uintptr_t q, std::uintptr_t k,
                                 std::uintptr_t v, std::uintptr_t score_weight, std::uintptr_t key_lengths,
                                 std::uintptr_t out, std::uintptr_t row_max, std::uintptr_t row_sum, const Sizes& sizes,
                                 const Strides<8>& strides, int64_t window_left, int64_t window_right, int num_threads);

// False, and nothing is done, where weight or bias is not contiguous or x or residual has no one row stride. The other
// tensors are contiguous.
bool add_layer_norm_forward(const Tensor& normed, const Tensor& summed, const Tensor& x, const Tensor& residual,
                            const Tensor& weight, const Tensor& bias, const Tensor& seed, double eps, bool rms,
                            double dropout_p, int num_threads);
void add_layer_norm_dropout_backward(const Tensor& dx, const Tensor& dresidual, const Tensor& seed, double dropout_p,
                                     int num_threads);
void add_layer_norm_backward(const Tensor& dresidual, const Tensor& dweight, const Tensor& dbias,
                             const Tensor& dnormed, const Tensor& dsummed, const Tensor& summed, const Tensor& weight,
                             double eps, bool rms, int num_threads);

void linear_cross_entropy(int dtype, std::uintptr_t loss, std::uintptr_t dhidden, std::uintptr_t dweight,
                          std::uintptr_t dbias, std::uintptr_t dloss, std::uintptr_t hidden, std::uintptr_t weight,
                          std::uintptr_t bias, std::uintptr_t targets, int64_t rows, int64_t features, int64_t classes,
                          int64_t hidden_stride, int64_t weight_stride, int64_t ignore_index, bool per_row, bool mean,
                          double label_smoothing, int num_threads);

void randn(int dtype, std::uintptr_t out, std::uintptr_t seeds, std::uintptr_t streams, int64_t batch, int64_t n,
           int num_threads);
void add_noise(int dtype, std::uintptr_t noisy, std::uintptr_t sample, std::uintptr_t noise,
               std::uintptr_t coefficients, std::uintptr_t seeds, int64_t batch, int64_t n, int num_threads);
void noise_prediction_loss_forward(int dtype, std::uintptr_t sums, std::uintptr_t model_output, std::uintptr_t sample,
                                   std::uintptr_t noise, std::uintptr_t coefficients, std::uintptr_t seeds,
                                   int64_t batch, int64_t n, int num_threads);
void noise_prediction_loss_backward(int dtype, std::uintptr_t dmodel_output, std::uintptr_t model_output,
                                    std::uintptr_t sample, std::uintptr_t noise, std::uintptr_t coefficients,
                                    std::uintptr_t dsums, std::uintptr_t seeds, int64_t batch, int64_t n,
                                    int num_threads);
void step(int dtype, std::uintptr_t prev_sample, std::uintptr_t model_output, std::uintptr_t unconditional_output,
          std::uintptr_t sample, std::uintptr_t noise, std::uintptr_t coefficients, double guidance_scale,
          double clip_range, std::uintptr_t seeds, std::uintptr_t streams, int64_t batch, int64_t n, int num_threads);
std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);
std::array<float, 2> normal_pair(uint32_t a, uint32_t b);

}  // namespace entry_points
}  // namespace leedl
