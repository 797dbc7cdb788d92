// The mix of a module: weighted_mix/cpu/bindings.cpp has that of the CPU module, weighted_mix/cuda/bindings.cpp that of
// the CUDA module.
#pragma once

#include <pybind11/pybind11.h>

namespace igva {

void bind_weighted_mix(pybind11::module_& m);

} // namespace igva
