// The dense CPU kernels of one instruction set. Each returns false for dtypes that it was not built for.
#pragma once

#include "common/activations.h"
#include "common/operands.h"

namespace igva::cpu {

// An operand [rows, depth] of a product: act(matrix). Strides count elements, and may be any.
struct Operand {
  DType dtype;
  const void* data;
  int64_t rows;
  int64_t depth;
  int64_t row_stride;
  int64_t depth_stride;
  Activation activation;
};

// Where a product adds up its parts in fp32: in the result itself, or in scratch memory that holds a block of rows.
struct Sums {
  float* data;
  int64_t stride;
  bool is_scratch;
  int64_t first_row; // that `data` holds
};

// How a product is cut; see dense/cpu/product.h.
constexpr int64_t strip_rows = 96, tile_columns = 64, slice_depth = 512;
constexpr int64_t row_stride = slice_depth + 16; // of packed rows: no power of two, at which they would share lines

// [rows, depth] times [columns, depth], transposed; see dense/cpu/plan_product.h.
struct Product {
  int64_t rows;
  int64_t columns;
  int64_t depth;
  int64_t block_rows; // multiplied at a time: a multiple of strip_rows
  Sums sums;
  float* strip_sums; // [strips of rows, columns], where the finished product leaves the sums of each strip
  float* scratch;    // of packed operands
};

// What becomes of the sums of a forward: z = sums + bias, y = act(z).
struct LinearEnd {
  const float* bias; // or null
  Activation activation;
  Matrix y;
  const Matrix* z; // or null
};

// What becomes of the gradient of y = act(z): grad_z = sums * act'(z), and its sums over the rows.
struct ActivationGradEnd {
  Activation activation;
  const Matrix* z; // or null, where there is no activation
  Matrix grad_z;
  float* column_sums; // or null
};

struct DenseKernels {
  // y = act(x) and a copy of x as z, rounded alike; z may be null.
  bool (*epilogue)(const Matrix& x, Activation activation, const Matrix& y, const Matrix* z, int threads);
  // grad_z = grad_y * act'(z), and y = act(z) unless y is null.
  bool (*activation_grad)(const Matrix& grad_y, const Matrix& z, Activation activation, const Matrix& grad_z,
                          const Matrix* y, int threads);
  // A Linear, y = act(x @ w^T + bias).
  bool (*linear)(const Product& product, const Operand& x, const Operand& w, const LinearEnd& end, int threads);
  // Its gradient, as far as the sums of the Linear before it.
  bool (*linear_grad)(const Product& product, const Operand& x, const Operand& w, const ActivationGradEnd& end,
                      int threads);
};

} // namespace igva::cpu
