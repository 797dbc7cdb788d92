// The product sums[m, n] = sum over k of x[m, k] * w[n, k], in fp32, of operands that need not exist in memory: each
// is asked for a panel of itself when the panel is needed, and may compute it. The finished sums are handed on in the
// same way. So a mix of layers, an activation or a transposition costs a product nothing but its arithmetic.
//
// The scheme is Goto's: x is packed in slices of its depth, which all threads read; each thread packs a tile of columns
// of w, as deep, which stays in its second-level cache; the innermost loop holds a tile of sums in registers, and
// broadcasts elements of x to multiply vectors of w. While a slice is multiplied, the next one is packed.
//
// What limits it (1152 x 4096 x 2048, AVX2 on a Zen 3): on panels in its caches a thread reaches 98 % of what its FMAs
// can do, on whole matrices in the last-level cache 84 %, as it waits for slices of x and for sums that other strips
// have displaced. Packing takes another 3 to 5 %, nearly all of it to read w from memory.
#pragma once

#include "cpu/parallel.h"
#include "cpu/vector_loops.h"
#include "dense/cpu/table.h"

namespace {

using namespace igva::cpu;

// In a slice of the depth, registers add up chains; their results are added in memory. The rounding error of a chain
// grows with the square root of its length: at this one a product is as close to fp64 as MKL's.
constexpr int64_t chain_depth = 176;

constexpr int tile_rows = Vec::product_rows, vectors = Vec::width == 1 ? 4 : 2, panel = vectors * Vec::width;
static_assert(strip_rows % tile_rows == 0 && tile_columns % panel == 0);

// An operand as the product reads it.
class Rows {
 public:
  // x[row + i, depth + k] to to[i * row_stride + k], for i < rows and k < count.
  virtual void pack(int64_t row, int64_t rows, int64_t depth, int64_t count, float* to, int thread) const = 0;
};

class Columns {
 public:
  // w[column + p * panel + j, depth + k] to to[(p * slice_depth + k) * panel + j] for k < count and the columns in
  // column..column + columns. What lies in a panel beyond them is not read by anyone.
  virtual void pack(int64_t column, int64_t columns, int64_t depth, int64_t count, float* to, int thread) const = 0;
};

class Finish {
 public:
  // Sums of rows row..row + rows and columns column..column + columns, at sums[i * panel + j]. Every element comes
  // once; those of one strip and one tile come from one thread, and in the order of the columns for each row.
  virtual void tile(const float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns) const = 0;
};

// to[i, j] = from[i, j] + sum over k < depth of a[i, k] * b[k, j] for a tile; `from` may be null, for zeros, or `to`.
inline void multiply_tile(int64_t depth, const float* a, const float* b, const float* from, int64_t from_stride,
                          float* to, int64_t to_stride) {
  Vec sums[tile_rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < tile_rows; ++i) {
    if (from) __builtin_prefetch(from + i * from_stride);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sums[i][j] = Vec::set(0);
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) columns[j] = Vec::load(b + k * panel + j * Vec::width);
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i) {
      const Vec element = Vec::set(a[i * row_stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] = fma(element, columns[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const Vec before = from ? Vec::load(from + i * from_stride + j * Vec::width) : Vec::set(0);
      (sums[i][j] + before).store(to + i * to_stride + j * Vec::width);
    }
  }
}

inline void copy_tile(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                      int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) memcpy(to + i * to_stride, from + i * from_stride, columns * sizeof(float));
}

// A part of the rows times a tile of the columns, over one slice of the depth.
struct Part {
  int64_t row, end_row, column, end_column;
  int64_t depth; // of the slice
  bool first, last; // of the slices
};

inline void multiply_part(const Part& part, const float* x, const float* w, const Sums& sums, const Finish& finish) {
  alignas(64) float tile[tile_rows * panel];
  for (int64_t strip = part.row; strip < part.end_row; strip += strip_rows) {
    const int64_t strip_end = strip + strip_rows < part.end_row ? strip + strip_rows : part.end_row;
    for (int64_t column = part.column; column < part.end_column; column += panel) {
      const int64_t columns = part.end_column - column < panel ? part.end_column - column : panel;
      const float* b = w + (column - part.column) * slice_depth;
      for (int64_t start = 0; start < part.depth; start += chain_depth) {
        const int64_t depth = part.depth - start < chain_depth ? part.depth - start : chain_depth;
        const bool first = part.first && start == 0, last = part.last && start + depth == part.depth;
        for (int64_t row = strip; row < strip_end; row += tile_rows) {
          const int64_t rows = strip_end - row < tile_rows ? strip_end - row : tile_rows;
          const float* a = x + (row - sums.first_row) * row_stride + start;
          float* at = sums.data + (row - sums.first_row) * sums.stride + column;
          const bool whole = rows == tile_rows && columns == panel;
          if (whole && !last) {
            multiply_tile(depth, a, b + start * panel, first ? nullptr : at, sums.stride, at, sums.stride);
            continue;
          }
          const float* from = first ? nullptr : at;
          int64_t from_stride = sums.stride;
          if (!whole && !first) {
            copy_tile(at, sums.stride, tile, panel, rows, columns);
            from = tile, from_stride = panel;
          }
          multiply_tile(depth, a, b + start * panel, from, from_stride, tile, panel);
          if (last) finish.tile(tile, row, rows, column, columns);
          else copy_tile(tile, panel, at, sums.stride, rows, columns);
        }
      }
    }
  }
}

void multiply(const Product& product, const Rows& x, const Columns& w, const Finish& finish, int threads) {
  const int64_t slices = (product.depth + slice_depth - 1) / slice_depth;
  const int64_t blocks = (product.rows + product.block_rows - 1) / product.block_rows;
  const int64_t strips = product.block_rows / strip_rows;
  const int64_t tiles = (product.columns + tile_columns - 1) / tile_columns;
  // Where there are too few tiles to occupy the threads, their rows are divided too, and w is packed more than once.
  const int64_t wanted = tiles >= 2 * threads ? 1 : (2 * threads + tiles - 1) / tiles;
  const int64_t strips_per_part = (strips + wanted - 1) / wanted;
  const int64_t parts = (strips + strips_per_part - 1) / strips_per_part;
  float* const packed_x[2] = {product.scratch, product.scratch + product.block_rows * row_stride};
  float* const packed_w = product.scratch + 2 * product.block_rows * row_stride;

  // Phase p packs slice p, counted through the blocks of rows, and multiplies slice p - 1.
  const auto rows_of = [&](int64_t p, int64_t strip, int64_t count) {
    const int64_t block = p / slices * product.block_rows;
    const int64_t block_end = block + product.block_rows < product.rows ? block + product.block_rows : product.rows;
    const int64_t row = block + strip * strip_rows, end = row + count * strip_rows;
    return Part{row, end < block_end ? end : block_end, 0, 0, 0, false, false};
  };
  const auto packs = [&](int64_t phase) { return phase < blocks * slices ? strips : 0; };
  const auto count = [&](int64_t phase) { return packs(phase) + (phase > 0 ? tiles * parts : 0); };
  parallel_phases(blocks * slices + 1, threads, count, [&](int64_t phase, int64_t i, int thread) {
    if (i < packs(phase)) {
      const Part part = rows_of(phase, i, 1);
      const int64_t start = phase % slices * slice_depth;
      const int64_t depth = product.depth - start < slice_depth ? product.depth - start : slice_depth;
      if (part.row < part.end_row) {
        float* strip = packed_x[phase % 2] + i * strip_rows * row_stride;
        x.pack(part.row, part.end_row - part.row, start, depth, strip, thread);
      }
      return;
    }
    const int64_t p = phase - 1, slice = p % slices, task = i - packs(phase);
    Part part = rows_of(p, task % parts * strips_per_part, strips_per_part);
    if (part.row >= part.end_row) return;
    const int64_t start = slice * slice_depth;
    part.depth = product.depth - start < slice_depth ? product.depth - start : slice_depth;
    part.first = slice == 0;
    part.last = slice == slices - 1;
    part.column = task / parts * tile_columns;
    part.end_column = part.column + tile_columns < product.columns ? part.column + tile_columns : product.columns;
    float* tile = packed_w + thread * tile_columns * slice_depth;
    w.pack(part.column, part.end_column - part.column, start, part.depth, tile, thread);
    Sums sums = product.sums;
    sums.first_row = p / slices * product.block_rows;
    if (!sums.is_scratch) sums.data += sums.first_row * sums.stride;
    multiply_part(part, packed_x[p % 2], tile, sums, finish);
  });
}

} // namespace
