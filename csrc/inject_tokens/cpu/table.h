// The CPU kernels of the injection, of one instruction set, and the jobs that they are given. All tensors of a job but
// the gate have one dtype; the gate and its gradient have the accumulation dtype.
#pragma once

#include "common/operands.h"

namespace igva::cpu {

// Which tokens take which rows of the features, and what the rows are multiplied by.
struct Taken {
  int64_t batch;
  int64_t tokens;
  int64_t width;
  const int32_t* rows;      // [B, T], -1 for none
  const int32_t* positions; // [V], the token that takes the row, -1 for none
  const void* gate;         // [1] or [V], or null
  bool one_gate;
};

struct InjectJob {
  Taken taken;
  View hidden;     // [B, T, H]
  Matrix features; // [V, H]; null for zeros
  bool replace;
  bool stream; // write around the cache; `out` starts at a multiple of 64 bytes
  void* out;   // [B, T, H], dense
};

struct FeaturesGradJob {
  Taken taken;
  View grad;           // [B, T, H]
  Matrix features;     // read for the gate's gradient alone
  bool stream;         // as in InjectJob
  void* grad_features; // [V, H], dense, or null
  void* row_dots;      // [V], what each row adds to the gate's gradient, or null
  void* gate_sum;      // the gradient of one gate, the sum of row_dots, or null
};

struct InjectKernels {
  bool (*inject)(const InjectJob& job, int threads);
  bool (*features_grad)(const FeaturesGradJob& job, int threads);
};

} // namespace igva::cpu
