// How a product is divided, and the memory that it works in. Results do not depend on it.
#pragma once

#include <algorithm>

#include "dense/cpu/table.h"

namespace igva::cpu {

// Memory for a product that adds up its sums in it, unless the result is in fp32 and takes them.
struct ProductMemory {
  int64_t rows, columns;
  bool holds_sums, holds_strip_sums;
  int threads;

  // Floats for blocks of so many rows.
  int64_t floats(int64_t block_rows) const {
    return block_rows * (2 * row_stride + (holds_sums ? columns : 0)) + threads * tile_columns * slice_depth +
           strip_floats();
  }

  // Rows of a block: as many as the memory allows, since w is packed for every block; blocks are equally large.
  int64_t block_rows(int64_t available) const {
    constexpr int64_t most_rows = 24 * strip_rows;
    const int64_t fitting = (available - floats(0)) / (floats(1) - floats(0)) / strip_rows * strip_rows;
    const int64_t limit = std::clamp(fitting, strip_rows, most_rows);
    const int64_t blocks = (rows + limit - 1) / limit;
    return (rows + blocks * strip_rows - 1) / (blocks * strip_rows) * strip_rows;
  }

  // Floats that a product uses of so many.
  int64_t wanted(int64_t most) const { return floats(block_rows(most)); }

  int64_t strip_floats() const { return holds_strip_sums ? (rows + strip_rows - 1) / strip_rows * columns : 0; }
};

// Scratch memory of a caller.
struct Scratch {
  float* data;
  int64_t floats;
};

inline ProductMemory memory_of(int64_t rows, int64_t columns, const Matrix* result, bool strip_sums, int threads) {
  return {rows, columns, !result || result->dtype != DType::f32, strip_sums, threads};
}

// A product in memory of this kind.
inline Product plan_product(const ProductMemory& memory, int64_t depth, const Matrix* result, const Scratch& scratch) {
  Product product = {memory.rows, memory.columns, depth, memory.block_rows(scratch.floats), {}, {}, nullptr};
  float* at = scratch.data;
  product.strip_sums = at;
  at += memory.strip_floats();
  if (memory.holds_sums) {
    product.sums = {at, memory.columns, true, 0};
    at += product.block_rows * memory.columns;
  } else {
    product.sums = {static_cast<float*>(result->data), result->stride, false, 0};
  }
  product.scratch = at;
  return product;
}

} // namespace igva::cpu
