// The few calls of the CUDA runtime that the bindings need.
#pragma once

#include <utility>

namespace igva::cuda {

const char* error_name(int error);
int set_device(int device);
std::pair<int, int> versions();

} // namespace igva::cuda
