// The dense CPU kernels: an activation after a product, and its gradient. See cpu/all_kernels.h for how they are
// compiled.
#pragma once

#include "common/operands.h"
#include "cpu/parallel.h"
#include "cpu/vector_loops.h"
#include "dense/cpu/activation.h"

namespace {

template <class T>
inline T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<T*>(matrix.data) + row * matrix.stride;
}

// f(row, first column, end column) over a matrix, in pieces so that threads can share one row.
template <class F>
inline void for_each_piece(int64_t rows, int64_t columns, int threads, F f) {
  constexpr int64_t piece = 1024; // columns: a few kilobytes, for which no thread waits long
  const int64_t pieces = (columns + piece - 1) / piece;
  parallel_for(rows * pieces, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * piece;
      f(i / pieces, first, first + piece < columns ? first + piece : columns);
    }
  });
}

bool epilogue(const Matrix& x, Activation activation, const Matrix& y, const Matrix* z, int threads) {
  return dispatch(x.dtype, y.dtype, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    using V = typename VecOf<In>::type;
    dispatch_activation(activation, [&](auto formula) {
      for_each_piece(x.rows, x.columns, threads, [&](int64_t row, int64_t first, int64_t end) {
        const In* from = row_of<In>(x, row);
        Out* to = row_of<Out>(y, row);
        Out* copy = z ? row_of<Out>(*z, row) : nullptr;
        for (int64_t i = first; i < end; i += V::width) {
          const int64_t n = end - i;
          const V value = load<V>(from + i, n);
          if (copy) store(value, copy + i, n);
          store(formula.value(value), to + i, n);
        }
      });
    });
  });
}

bool activation_grad(const Matrix& grad_y, const Matrix& z, Activation activation, const Matrix& grad_z, const Matrix* y,
                     int threads) {
  return dispatch(grad_y.dtype, z.dtype, [&](auto grad, auto value) {
    using Grad = decltype(grad);
    using T = decltype(value);
    using V = typename VecOf<Grad>::type;
    dispatch_activation(activation, [&](auto formula) {
      for_each_piece(z.rows, z.columns, threads, [&](int64_t row, int64_t first, int64_t end) {
        const Grad* grad_row = row_of<Grad>(grad_y, row);
        const T* z_row = row_of<T>(z, row);
        T* out = row_of<T>(grad_z, row);
        T* again = y ? row_of<T>(*y, row) : nullptr;
        for (int64_t i = first; i < end; i += V::width) {
          const int64_t n = end - i;
          const ValueAndGrad<V> result = formula.value_and_grad(load<V>(z_row + i, n), load<V>(grad_row + i, n));
          if (again) store(result.value, again + i, n);
          store(result.grad, out + i, n);
        }
      });
    });
  });
}

} // namespace
