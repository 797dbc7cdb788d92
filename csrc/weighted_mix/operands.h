// What the kernels of the mix take on the CPU and on a GPU alike. Strides count elements.
//
// Symbols: B rows of the batch, I images, T tokens of a hidden state, P = T - skip patches (the tokens that are not
// skipped), D width of a layer, G blocks of a mixed row, C weight columns, M = B * P mixed rows.
#pragma once

#include <cstdint>

namespace igva {

// One hidden state [I, T, D], last dimension contiguous.
struct Layer {
  const void* data;
  int64_t image_stride;
  int64_t token_stride;
};

// weights[b, c] at data[b * row_stride + c * column_stride], in the accumulation dtype of the layers.
struct MixWeights {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
  int64_t columns;
};

// The rows of the batch: row b reads image image_index[b], or image b where the index is null.
struct Batch {
  const int64_t* image_index;
  int64_t rows;
  int64_t image_of(int64_t row) const { return image_index ? image_index[row] : row; }
};

// What one block of the mixed row contributes to the gradient of a layer: scale * weights[b, column] * gradient of the
// block. Column -1 is the constant weight 1.
struct Share {
  int32_t block;
  int32_t column;
  double scale;
};

} // namespace igva
