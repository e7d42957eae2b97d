// What Python calls, bound in module.cpp and defined beside the kernels: functions that fill the tensors that stand
// first. An absent one is None. Arguments were checked in Python; dtypes are float32, bfloat16 and float16 unless
// something else is said.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace leedl::entry_points {

// Of diffusion, samples are (batch, ...) and contiguous, coefficients (batch, kinds) float64, seeds and streams (batch,)
// int64. Either noise is given or made from the seeds.
void randn(const Tensor& out, const Tensor& seeds);

}  // namespace leedl::entry_points
