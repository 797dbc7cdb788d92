// Parameters of the dense CUDA kernels. All matrices are dense.
#pragma once

#include <cstdint>

#include "common/activations.h"
#include "common/operands.h"
#include "cuda/host.h"

namespace igva::cuda {

// grad_z = grad_y * act'(z), y = act(z) (or y null), all [rows, columns]; grad_z may be grad_y.
struct ActivationGradParams {
  int64_t rows;
  int32_t columns;
  Activation activation;
  const void* grad_y;
  const void* z;
  void* grad_z;
  void* y;
  void* partials; // [chunks, columns], sums of the unrounded grad_z over `chunk` rows, fp32 or fp64; or null
  int32_t chunk;
};

// grad_rows = rstd * (g - mean(g) - n * mean(g * n)), g = grad * weight, n = (rows - mean) * rstd.
struct NormGradParams {
  int64_t num_rows;
  int32_t width; // of a row: G * D
  const void* grad;
  const void* rows;
  Norm norm;
  void* grad_rows;
  void* partials; // [chunks, 2, width], sums over `chunk` rows of grad * n and of grad; or null
  int32_t chunk;
};

// Launchers. `vector` asks for 16-byte accesses, which all addresses must allow.
int activation_grad(const ActivationGradParams& params, DType dtype, bool vector, Stream stream);
int norm_grad(const NormGradParams& params, DType dtype, bool vector, Stream stream);

} // namespace igva::cuda
