// The dense CPU kernels of one instruction set. Each returns false for dtypes that it was not built for.
#pragma once

#include "common/activations.h"
#include "common/operands.h"

namespace igva::cpu {

struct DenseKernels {
  // y = act(x) and a copy of x as z, rounded alike; z may be null.
  bool (*epilogue)(const Matrix& x, Activation activation, const Matrix& y, const Matrix* z, int threads);
  // grad_z = grad_y * act'(z), and y = act(z) unless y is null.
  bool (*activation_grad)(const Matrix& grad_y, const Matrix& z, Activation activation, const Matrix& grad_z,
                          const Matrix* y, int threads);
};

} // namespace igva::cpu
