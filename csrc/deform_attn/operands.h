// What Python hands to the kernels of deformable attention, on the CPU and on a GPU alike.
#pragma once

#include <cstdint>

#include "common/operands.h"

namespace igva {

// What the positions of the points count from; the formulas are in igva_kernels/ops/deform_attn/geometry.py.
enum class Origin : int32_t { grid, image, points, boxes };

// One level, [batch, height * width, heads, head width], whose last dimension is contiguous.
struct Level {
  void* data; // null where it is not read
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
  int32_t height;
  int32_t width;
  int32_t first; // of its points among all of a query and head
  int32_t points;
};

} // namespace igva
