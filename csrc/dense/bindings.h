// The dense steps of a module: dense/cpu/bindings.cpp has those of the CPU module, dense/cuda/bindings.cpp those of the
// CUDA module.
#pragma once

#include <pybind11/pybind11.h>

namespace igva {

void bind_dense(pybind11::module_& m);

} // namespace igva
