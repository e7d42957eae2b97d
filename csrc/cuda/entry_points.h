// What Python calls, bound in module.cpp and defined beside the kernels: functions that fill the tensors that stand
// first. An absent one is None. Arguments were checked in Python; dtypes are float32, bfloat16 and float16 unless
// something else is said.
#pragma once

#include "tensors.h"  // Python.h, which must come first

#include <array>
#include <cstdint>
#include <string>
#include <tuple>

namespace leedl {

using AttentionInputs = std::array<Tensor, 5>;  // sinks alibi_slopes key_lengths cu_seqlens_q cu_seqlens_k
using AttentionOptions = std::tuple<double, int64_t, int64_t>;  // softmax_scale, window_left, window_right

}  // namespace leedl

namespace leedl::entry_points {

// What the driver says where it cannot run these kernels, or nothing.
std::string driver_error();

// False, and nothing is done, where weight or bias is not contiguous or x or residual has no one row stride. The other
// tensors are contiguous.
bool add_layer_norm_forward(const Tensor& normed, const Tensor& summed, const Tensor& x, const Tensor& residual,
                            const Tensor& weight, const Tensor& bias, const Tensor& seed, double eps, bool rms,
                            double dropout_p);
void add_layer_norm_dropout_backward(const Tensor& dx, const Tensor& dresidual, const Tensor& seed, double dropout_p);
// partial: (parts, 2, n) float32, to work in; it has any number of parts, which decides the order of the sums.
void add_layer_norm_backward(const Tensor& dresidual, const Tensor& dweight, const Tensor& dbias,
                             const Tensor& partial, const Tensor& dnormed, const Tensor& dsummed, const Tensor& summed,
                             const Tensor& weight, double eps, bool rms);

// Of attention, tensors are bfloat16 or float16 and statistics float32. False, and nothing is done, where a row of an
// input does not begin at a multiple of 16 bytes.
bool attention_forward(const Tensor& out, const Tensor& lse, const Tensor& base, const Tensor& inverse_sum,
                       const Tensor& q, const Tensor& k, const Tensor& v, const AttentionInputs& inputs,
                       const AttentionOptions& options);

// `delta` and, without sinks none, `dsinks_of_rows` are like lse, dlse too, or none.
bool attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& delta,
                        const Tensor& dsinks_of_rows, const Tensor& dout, const Tensor& out, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& dlse, const Tensor& base,
                        const Tensor& inverse_sum, const AttentionInputs& inputs, const AttentionOptions& options);

// Of diffusion, samples are (batch, ...) and contiguous, coefficients (batch, kinds) float64, seeds and streams (batch,)
// int64. Either noise is given or made from the seeds.
void randn(const Tensor& out, const Tensor& seeds);
void add_noise(const Tensor& noisy, const Tensor& sample, const Tensor& noise, const Tensor& coefficients,
               const Tensor& seeds);
// partial: (batch, parts) float64, to work in; it has any number of parts, which decides the order of the sums.
void noise_prediction_loss_forward(const Tensor& sums, const Tensor& partial, const Tensor& model_output,
                                   const Tensor& sample, const Tensor& noise, const Tensor& coefficients,
                                   const Tensor& seeds);
void noise_prediction_loss_backward(const Tensor& dmodel_output, const Tensor& model_output, const Tensor& sample,
                                    const Tensor& noise, const Tensor& coefficients, const Tensor& dsums,
                                    const Tensor& seeds);
void step(const Tensor& prev_sample, const Tensor& model_output, const Tensor& unconditional_output,
          const Tensor& sample, const Tensor& noise, const Tensor& coefficients, const Tensor& seeds,
          const Tensor& streams, double guidance_scale, double clip_range);

}  // namespace leedl::entry_points
