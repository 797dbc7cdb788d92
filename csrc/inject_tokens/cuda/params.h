// Parameters of the CUDA kernels of the injection. All tensors of a call but the gate have one dtype; the gate and the
// row dots have the accumulation dtype.
#pragma once

#include <cstdint>

#include "common/operands.h"
#include "cuda/host.h"

namespace igva::cuda {

// What the rows of the features are multiplied by: one number per row (stride 1), the same for all (0), or null for 1.
struct Gate {
  const void* data;
  int32_t stride;
};

// out[b, t] = [hidden[b, t] +] gate * features[rows[b, t]] where there is a row, and the bits of hidden[b, t] where it
// is -1. A row out of range gives NaN. Without features, tokens that have a row become zeros.
struct InjectParams {
  View hidden;         // [B, T, H]
  Matrix features;     // [V, H]; null with any number of rows for zeros
  const int32_t* rows; // [B, T], dense
  Gate gate;
  void* out; // [B, T, H], dense
  int32_t num_tokens; // B * T
  int32_t tokens; // of a batch row: T
  int32_t width;
  bool replace;
};

// grad_features[v] = gate * grad[positions[v]], and row_dots[v] = <grad[positions[v]], features[v]>: zeros where no
// token took the row (-1), NaN where several did (-2).
struct FeaturesGradParams {
  View grad;                // [B, T, H]
  Matrix features;          // [V, H], or null without row_dots
  const int32_t* positions; // [V], b * T + t
  Gate gate;
  void* grad_features; // [V, H], dense, or null
  void* row_dots;      // [V], or null
  int32_t num_features;
  int32_t tokens;
  int32_t width;
};

// Launchers. `vector` asks for 16-byte accesses, which all addresses and strides must allow.
int inject(const InjectParams& params, bool vector, Stream stream);
int features_grad(const FeaturesGradParams& params, bool vector, Stream stream);

} // namespace igva::cuda
