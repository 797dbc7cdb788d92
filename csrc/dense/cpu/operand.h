// Matrices as operands of a product, and what becomes of its sums. See dense/cpu/product.h.
#pragma once

#include "dense/cpu/activation.h"
#include "dense/cpu/product.h"

namespace {

// Products are in fp32: of every dtype but fp64.
inline bool takes_products(DType a, DType b, DType c) {
  return a != DType::f64 && b != DType::f64 && c != DType::f64;
}

// f(T{}) with the C++ type of a dtype that products take.
template <class F>
inline void dispatch_operand(DType dtype, F f) {
  dispatch_second<float>(dtype, [&](float, auto type) { f(type); });
}

// to[j * to_stride + i] = from[i * row_stride + j * column_stride]
template <class T>
inline void copy_transposed(const T* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                               float* to, int64_t to_stride) {
  int64_t done_rows = 0, done_columns = 0;
#ifndef IGVA_SCALAR
  if (column_stride == 1) {
    done_rows = rows / 8 * 8;
    done_columns = columns / 8 * 8;
    for (int64_t i = 0; i < done_rows; i += 8) {
      for (int64_t j = 0; j < done_columns; j += 8) {
        Avx2 block[8];
        for (int r = 0; r < 8; ++r) block[r] = Avx2::load(from + (i + r) * row_stride + j);
        transpose(block);
        for (int c = 0; c < 8; ++c) block[c].store(to + (j + c) * to_stride + i);
      }
    }
  }
#endif
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < done_rows ? done_columns : 0; j < columns; ++j) {
      to[j * to_stride + i] = to_float(from[i * row_stride + j * column_stride]);
    }
  }
}

inline void activate(Activation activation, float* row, int64_t n) {
  if (activation == Activation::none) return;
  dispatch_activation(activation, [&](auto formula) {
    for (int64_t i = 0; i < n; i += Vec::width) store(formula.value(load<Vec>(row + i, n - i)), row + i, n - i);
  });
}

template <class T>
class MatrixRows final : public Rows {
 public:
  explicit MatrixRows(const Operand& operand) : a_(operand) {}

  void pack(int64_t row, int64_t rows, int64_t depth, int64_t count, float* to, int) const override {
    const T* from = static_cast<const T*>(a_.data) + row * a_.row_stride + depth * a_.depth_stride;
    if (a_.depth_stride == 1) {
      for (int64_t i = 0; i < rows; ++i) copy_row<Vec>(from + i * a_.row_stride, count, to + i * row_stride);
    } else {
      copy_transposed(from, a_.depth_stride, a_.row_stride, count, rows, to, row_stride);
    }
    for (int64_t i = 0; i < rows; ++i) activate(a_.activation, to + i * row_stride, count);
  }

 private:
  Operand a_;
};

template <class T>
class MatrixColumns final : public Columns {
 public:
  explicit MatrixColumns(const Operand& operand) : a_(operand) {}

  void pack(int64_t column, int64_t columns, int64_t depth, int64_t count, float* to, int) const override {
    for (int64_t first = 0; first < columns; first += panel, to += panel * slice_depth) {
      const int64_t n = columns - first < panel ? columns - first : panel;
      const T* from = static_cast<const T*>(a_.data) + (column + first) * a_.row_stride + depth * a_.depth_stride;
      if (a_.row_stride == 1) {
        for (int64_t k = 0; k < count; ++k) copy_row<Vec>(from + k * a_.depth_stride, n, to + k * panel);
      } else {
        copy_transposed(from, a_.row_stride, a_.depth_stride, n, count, to, panel);
      }
      if (a_.activation == Activation::none) continue;
      for (int64_t k = 0; k < count; ++k) activate(a_.activation, to + k * panel, n);
    }
  }

 private:
  Operand a_;
};

template <class T>
inline T* at(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<T*>(matrix.data) + row * matrix.stride + column;
}

// f(index in a tile, row, column, lanes) for every vector of a tile.
template <class F>
inline void for_each_vector(int64_t row, int64_t rows, int64_t column, int64_t columns, F f) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += Vec::width) f(i * panel + j, row + i, column + j, columns - j);
  }
}

template <class T, class Formula>
class LinearFinish final : public Finish {
 public:
  explicit LinearFinish(const LinearEnd& end) : end_(end) {}

  void tile(const float* sums, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns) const override {
    for_each_vector(first_row, rows, first_column, columns, [&](int64_t i, int64_t row, int64_t column, int64_t n) {
      Vec z = load<Vec>(sums + i, n);
      if (end_.bias) z = z + load<Vec>(end_.bias + column, n);
      if (end_.z) store(z, at<T>(*end_.z, row, column), n);
      store(Formula::value(z), at<T>(end_.y, row, column), n);
    });
  }

 private:
  LinearEnd end_;
};

template <class T, class Formula>
class ActivationGradFinish final : public Finish {
 public:
  ActivationGradFinish(const ActivationGradEnd& end, const Product& product) : end_(end), product_(product) {}

  void tile(const float* sums, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns) const override {
    float* strip = end_.column_sums ? product_.strip_sums + first_row / strip_rows * product_.columns : nullptr;
    for_each_vector(first_row, rows, first_column, columns, [&](int64_t i, int64_t row, int64_t column, int64_t n) {
      Vec grad = load<Vec>(sums + i, n);
      if (end_.z) grad = Formula::value_and_grad(load<Vec>(at<T>(*end_.z, row, column), n), grad).grad;
      store(grad, at<T>(end_.grad_z, row, column), n);
      if (!strip) return;
      const Vec before = row % strip_rows == 0 ? Vec::set(0) : load<Vec>(strip + column, n);
      store(before + grad, strip + column, n);
    });
  }

 private:
  ActivationGradEnd end_;
  const Product& product_;
};

template <class F>
inline void with_rows(const Operand& x, F f) {
  dispatch_operand(x.dtype, [&](auto type) { f(MatrixRows<decltype(type)>(x)); });
}

template <class F>
inline void with_columns(const Operand& w, F f) {
  dispatch_operand(w.dtype, [&](auto type) { f(MatrixColumns<decltype(type)>(w)); });
}

template <class F>
inline void with_finish(const LinearEnd& end, F f) {
  dispatch_operand(end.y.dtype, [&](auto type) {
    dispatch_activation(end.activation, [&](auto formula) { f(LinearFinish<decltype(type), decltype(formula)>(end)); });
  });
}

bool linear(const Product& product, const Operand& x, const Operand& w, const LinearEnd& end, int threads) {
  if (!takes_products(x.dtype, w.dtype, end.y.dtype)) return false;
  with_rows(x, [&](const Rows& rows) {
    with_columns(w, [&](const Columns& columns) {
      with_finish(end, [&](const Finish& finish) { multiply(product, rows, columns, finish, threads); });
    });
  });
  return true;
}

bool linear_grad(const Product& product, const Operand& x, const Operand& w, const ActivationGradEnd& end,
                 int threads) {
  if (!takes_products(x.dtype, w.dtype, end.grad_z.dtype)) return false;
  with_rows(x, [&](const Rows& rows) {
    with_columns(w, [&](const Columns& columns) {
      dispatch_operand(end.grad_z.dtype, [&](auto type) {
        dispatch_activation(end.activation, [&](auto formula) {
          using End = ActivationGradFinish<decltype(type), decltype(formula)>;
          multiply(product, rows, columns, End(end, product), threads);
        });
      });
    });
  });
  for (int64_t j = 0; end.column_sums && j < product.columns; ++j) {
    double sum = 0;
    for (int64_t i = 0; i * strip_rows < product.rows; ++i) sum += product.strip_sums[i * product.columns + j];
    end.column_sums[j] = float(sum);
  }
  return true;
}

} // namespace
