// The injection of a module: inject_tokens/cpu/bindings.cpp has that of the CPU module, inject_tokens/cuda/bindings.cpp
// that of the CUDA module.
#pragma once

#include <pybind11/pybind11.h>

namespace igva {

void bind_inject_tokens(pybind11::module_& m);

} // namespace igva
