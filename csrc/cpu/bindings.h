// What every kernel file of this module offers to module.cpp: one function that binds its entry points.
#pragma once

#include <pybind11/pybind11.h>

namespace leedl {

void bind_attention(pybind11::module_& m);
void bind_additive_attention(pybind11::module_& m);
void bind_add_layer_norm(pybind11::module_& m);
void bind_diffusion(pybind11::module_& m);
void bind_linear_cross_entropy(pybind11::module_& m);

}  // namespace leedl
