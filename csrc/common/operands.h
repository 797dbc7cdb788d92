// What Python hands to kernels of any operator, on the CPU and on a GPU alike. Strides count elements; a null address
// means that there is no such tensor.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace igva {

// A tensor [batch, tokens, width] whose last dimension is contiguous.
struct View {
  DType dtype;
  void* data;
  int64_t batch_stride;
  int64_t token_stride;
};

// A tensor [rows, columns] whose last dimension is contiguous.
struct Matrix {
  DType dtype;
  void* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;
};

// A learned vector, dense, as long as the row that it belongs to.
struct Parameter {
  DType dtype;
  const void* data;
};

// LayerNorm over whole rows. `mean` and `rstd` have one element per row, in the accumulation dtype: the forward writes
// them, the backward reads them.
struct Norm {
  Parameter weight;
  Parameter bias;
  double eps;
  void* mean;
  void* rstd;
};

} // namespace igva
