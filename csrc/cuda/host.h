// What host code knows of the GPU: launches, the few calls of the CUDA runtime that bindings need, and their checks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace igva::cuda {

// Launchers queue work on a stream of the current device and return the runtime's error, 0 being success.
using Stream = void*;

const char* error_name(int error);
int set_device(int device);

// What the current device has.
struct Card {
  int multiprocessors;
  size_t shared; // bytes of shared memory that a block may have
};
int card(Card& found);

std::pair<int, int> versions();

// Throws where `error` is not the runtime's success.
inline void check(int error, const char* what) {
  if (error == 0) return;
  throw std::runtime_error(std::string("igva_kernels: CUDA fails at ") + what + ": " + error_name(error));
}

// Kernels count rows in 32 bits, and elements in 64. The last block of threads counts up to 512 rows beyond the end.
inline int32_t count32(int64_t count) {
  if (count <= INT32_MAX - 512) return int32_t(count);
  throw std::invalid_argument("the CUDA kernels count rows in 32 bits, got " + std::to_string(count));
}

} // namespace igva::cuda
