// Products whose operand is the mixed row, computed as it is packed, and the dots of a product with layers: neither the
// rows nor their gradient exist in memory. See dense/cpu/product.h.
#pragma once

#include "dense/cpu/operand.h"
#include "weighted_mix/cpu/kernels.h"

namespace {

// Columns column..column + columns of the mixed rows row..row + rows, to to[i * stride + j].
template <class In>
inline void mix_part(const MixSource& a, int64_t row, int64_t rows, int64_t column, int64_t columns, float* to,
                     int64_t stride, int thread) {
  const In** pointers = reinterpret_cast<const In**>(a.row_pointers + thread * a.plan.longest_term);
  for (int64_t done = 0; done < rows;) {
    const int64_t b = (row + done) / a.num_patches, patch = (row + done) % a.num_patches;
    const int64_t patches = rows - done < a.num_patches - patch ? rows - done : a.num_patches - patch;
    const int64_t image = a.batch.image_of(b);
    const float* weights = static_cast<const float*>(a.weights.data) + b * a.weights.row_stride;
    for (int64_t block = column / a.width; block * a.width < column + columns; ++block) {
      const int64_t from = block * a.width < column ? column : block * a.width;
      const int64_t end = (block + 1) * a.width < column + columns ? (block + 1) * a.width : column + columns;
      const Span span = {image, patch, patches, from - block * a.width, end - from};
      float* at = to + done * stride + from - column;
      mix_block<Vec, false>(a, int(block), span, pointers, weights, at, stride, at, stride);
    }
    done += patches;
  }
  if (!a.norm) return;
  for (int64_t i = 0; i < rows; ++i) {
    normalize<Vec>(to + i * stride, column, columns, *a.norm, row + i, to + i * stride);
  }
}

template <class In>
class MixedRows final : public Rows {
 public:
  MixedRows(const MixSource& source, int64_t first_row) : source_(source), first_row_(first_row) {}

  // A few rows at a time, whose sums stay in the first-level cache from one term to the next.
  void pack(int64_t row, int64_t rows, int64_t depth, int64_t count, float* to, int thread) const override {
    constexpr int64_t step = 8;
    for (int64_t i = 0; i < rows; i += step) {
      mix_part<In>(source_, first_row_ + row + i, rows - i < step ? rows - i : step, depth, count, to + i * row_stride,
                   row_stride, thread);
    }
  }

 private:
  const MixSource& source_;
  int64_t first_row_;
};

template <class In>
class MixedColumns final : public Columns {
 public:
  explicit MixedColumns(const MixSource& source) : source_(source) {}

  void pack(int64_t column, int64_t columns, int64_t depth, int64_t count, float* to, int thread) const override {
    constexpr int64_t step = 16;
    float mixed[step * tile_columns];
    for (int64_t k = 0; k < count; k += step) {
      const int64_t rows = count - k < step ? count - k : step;
      mix_part<In>(source_, depth + k, rows, column, columns, mixed, tile_columns, thread);
      for (int64_t j = 0; j < columns; j += panel) {
        const int64_t n = columns - j < panel ? columns - j : panel;
        float* at = to + j * slice_depth + k * panel;
        for (int64_t i = 0; i < rows; ++i) copy_row<Vec>(mixed + i * tile_columns + j, n, at + i * panel);
      }
    }
  }

 private:
  const MixSource& source_;
};

template <class In>
class DotsFinish final : public Finish {
 public:
  DotsFinish(const DotsJob& job, int64_t columns) : job_(job), tiles_((columns + tile_columns - 1) / tile_columns) {}

  void tile(const float* sums, int64_t first_row, int64_t rows, int64_t column, int64_t columns) const override {
    const int64_t end = column + columns;
    for (int64_t i = 0; i < rows; ++i, sums += panel) {
      const int64_t row = first_row + i, b = row / job_.num_patches, patch = row % job_.num_patches;
      const int64_t image = job_.batch.image_of(b);
      double* dots = job_.dots + (row * tiles_ + column / tile_columns) * job_.num_entries;
      for (int e = 0; e < job_.num_entries; ++e) {
        if (column % tile_columns == 0) dots[e] = 0;
        const int64_t offset = job_.offsets[e];
        const int64_t from = offset < column ? column : offset;
        const int64_t until = offset + job_.width < end ? offset + job_.width : end;
        if (from >= until) continue;
        const Layer& layer = job_.layers[e];
        const In* h = static_cast<const In*>(layer.data) + image * layer.image_stride + patch * layer.token_stride;
        dots[e] += dot<Vec>(sums + from - column, h + from - offset, until - from);
      }
    }
  }

 private:
  const DotsJob& job_;
  int64_t tiles_;
};

bool mixed_linear(const Product& product, DType layers, const MixSource& source, int64_t first_row, const Operand& w,
                  const LinearEnd& end, int threads) {
  if (!takes_products(layers, w.dtype, end.y.dtype)) return false;
  dispatch_operand(layers, [&](auto type) {
    const MixedRows<decltype(type)> rows(source, first_row);
    with_columns(w, [&](const Columns& columns) {
      with_finish(end, [&](const Finish& finish) { multiply(product, rows, columns, finish, threads); });
    });
  });
  return true;
}

bool mixed_linear_grad(const Product& product, const Operand& x, DType layers, const MixSource& source,
                       const Matrix& grad, int threads) {
  if (!takes_products(x.dtype, layers, grad.dtype)) return false;
  with_rows(x, [&](const Rows& rows) {
    dispatch_operand(layers, [&](auto type) {
      const MixedColumns<decltype(type)> columns(source);
      with_finish({nullptr, Activation::none, grad, nullptr},
                  [&](const Finish& finish) { multiply(product, rows, columns, finish, threads); });
    });
  });
  return true;
}

bool linear_dots(const Product& product, const Operand& x, const Operand& w, DType layers, const DotsJob& job,
                 int threads) {
  if (!takes_products(x.dtype, w.dtype, layers)) return false;
  with_rows(x, [&](const Rows& rows) {
    with_columns(w, [&](const Columns& columns) {
      dispatch_operand(layers, [&](auto type) {
        multiply(product, rows, columns, DotsFinish<decltype(type)>(job, product.columns), threads);
      });
    });
  });
  return true;
}

} // namespace
