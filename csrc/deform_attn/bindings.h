// Deformable attention of a module: deform_attn/cpu/bindings.cpp has that of the CPU module,
// deform_attn/cuda/bindings.cpp that of the CUDA module.
#pragma once

#include <pybind11/pybind11.h>

namespace igva {

void bind_deform_attn(pybind11::module_& m);

} // namespace igva
