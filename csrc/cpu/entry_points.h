// What Python calls, bound in module.cpp and defined beside the kernels: functions that fill the tensors that stand
// first. An absent one is None. Arguments were checked in Python.
#pragma once

#include <array>
#include <cstdint>
#include <tuple>

#include "tensors.h"

namespace leedl {

using AttentionInputs = std::array<Tensor, 7>;  // bias sinks alibi_slopes key_lengths cu_seqlens_q cu_seqlens_k seed
// softmax_scale, window_left, window_right, normalizer, softcap, dropout_p, num_threads
using Options = std::tuple<double, int64_t, int64_t, int, double, double, int>;

namespace entry_points {

void attention_forward(const Tensor& out, const Tensor& lse, const Tensor& row_max, const Tensor& row_sum,
                       const Tensor& q, const Tensor& k, const Tensor& v, const AttentionInputs& inputs,
                       const Options& options);
void attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dbias, const Tensor& dsinks,
                        const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const AttentionInputs& inputs, const Tensor& out, const Tensor& row_max, const Tensor& row_sum,
                        const Options& options);

void additive_attention_forward(const Tensor& out, const Tensor& row_max, const Tensor& row_sum, const Tensor& q,
                                const Tensor& k, const Tensor& v, const Tensor& score_weight,
                                const Tensor& key_lengths, int64_t window_left, int64_t window_right, int num_threads);
void additive_attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dscore_weight,
                                 const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& score_weight, const Tensor& key_lengths, const Tensor& out,
                                 const Tensor& row_max, const Tensor& row_sum, int64_t window_left,
                                 int64_t window_right, int num_threads);

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

// `loss` or `dhidden` and `dweight` may be none, and are not made; no dloss means 1.
void linear_cross_entropy(const Tensor& loss, const Tensor& dhidden, const Tensor& dweight, const Tensor& dbias,
                          const Tensor& dloss, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                          const Tensor& targets, int64_t ignore_index, bool per_row, bool mean, double label_smoothing,
                          int num_threads);

// seeds[b] = the output b + 1 of the SplitMix64 generator (Steele et al. 2014) that starts at `seed`; (batch,) int64.
void sample_seeds(const Tensor& seeds, int64_t seed);
// Of diffusion, samples are (batch, ...) and contiguous, coefficients (batch, kinds) float64, seeds and streams (batch,)
// int64. Either noise is given or made from the seeds.
void randn(const Tensor& out, const Tensor& seeds, const Tensor& streams, int num_threads);
void add_noise(const Tensor& noisy, const Tensor& sample, const Tensor& noise, const Tensor& coefficients,
               const Tensor& seeds, int num_threads);
void noise_prediction_loss_forward(const Tensor& sums, const Tensor& model_output, const Tensor& sample,
                                   const Tensor& noise, const Tensor& coefficients, const Tensor& seeds,
                                   int num_threads);
void noise_prediction_loss_backward(const Tensor& dmodel_output, const Tensor& model_output, const Tensor& sample,
                                    const Tensor& noise, const Tensor& coefficients, const Tensor& dsums,
                                    const Tensor& seeds, int num_threads);
void step(const Tensor& prev_sample, const Tensor& model_output, const Tensor& unconditional_output,
          const Tensor& sample, const Tensor& noise, const Tensor& coefficients, const Tensor& seeds,
          const Tensor& streams, double guidance_scale, double clip_range, int num_threads);

std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);
std::array<float, 2> normal_pair(uint32_t a, uint32_t b);

}  // namespace entry_points
}  // namespace leedl
