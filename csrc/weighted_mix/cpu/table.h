// The CPU kernels of the mix, of one instruction set, and the jobs that they are given. Each kernel takes the dtypes of
// what it reads and writes and returns false for a pair that it was not built for.
#pragma once

#include "common/operands.h"
#include "dense/cpu/table.h"
#include "weighted_mix/operands.h"

namespace igva::cpu {

// scale * weights[:, column] * sum of the layers term_layers[begin:end]; column -1 is the constant weight 1.
struct Term {
  int32_t column;
  int32_t begin;
  int32_t end;
  double scale;
};

// A plan in tables: block g of the mixed row is the sum of terms[block_begin[g]:block_begin[g + 1]].
// Blocks 0..num_blocks-1 make the mixed row; the num_sums blocks after them are weight-free sums to be kept.
struct Tables {
  const Term* terms;
  const int32_t* term_layers;
  const int32_t* block_begin;
  int32_t num_blocks;
  int32_t num_sums;
  int32_t longest_term; // in layers; a term may name the same layer more than once
};

// Patches patch..patch+patches of one image, for the batch rows batch_rows[begin:end] that read it.
struct Tile {
  int64_t image;
  int64_t patch;
  int64_t patches;
  int64_t begin;
  int64_t end;
};

// Where mixed rows come from. In every job the layers' `data` points to the first token not skipped.
struct MixSource {
  Tables plan;
  const Layer* layers;
  MixWeights weights;
  Batch batch;
  int64_t num_patches;
  int64_t width;
  const Norm* norm;          // or null; its parameters are in the accumulation dtype
  const void** row_pointers; // longest_term of them per thread
};

// Mixed rows, tile by tile.
struct MixJob : MixSource {
  const Tile* tiles; // no patch of an image is in two of them
  int64_t num_tiles;
  const int64_t* batch_rows;
  int64_t first_row; // row b * P + p of the mixed rows lies at rows[b * P + p - first_row]
  void* rows;        // [.., G * D], or null where only sums and the norm's statistics are asked for
  void* raw_rows;    // the rows before the norm, laid out as rows, or null
  void* const* sums; // num_sums of [I, P, D], in the layers' dtype
  void* scratch; // scratch_stride elements of the accumulation dtype per thread: a tile of a block, or of a norm's row
  int64_t scratch_stride;
  bool stream;               // write around the cache; rows and sums start at multiples of 64 bytes
};

// dots[b, chunk, e] = sum over the patches p of the chunk and d of grad[b, p, offset_e + d] * layer_e[image(b), p, d].
struct DotsJob {
  Batch batch;
  int64_t num_patches;
  int64_t width;
  int64_t chunk; // patches per chunk
  View grad;
  int32_t num_entries;
  const int64_t* offsets; // [num_entries]
  const Layer* layers;    // [num_entries]
  double* dots;
};

// grads[s][i, skip + p, d] = sum over the rows b of image i and the shares (block, column, scale) of gradient s of
// scale * weights[b, column] * grad[b, p, block * D + d]; skipped tokens get zeros.
struct LayerGradsJob {
  int64_t num_images;
  int64_t num_patches;
  int64_t skip;
  int64_t width;
  View grad;                  // [B, P, G * D]
  const int64_t* image_rows;  // batch rows sorted by image, in row order
  const int64_t* image_begin; // [I + 1]
  MixWeights weights;
  int32_t num_grads;
  const int32_t* share_begin; // [num_grads + 1]
  const Share* shares;
  void* const* grads; // num_grads of [I, T, D]
};

struct MixKernels {
  bool (*mix)(DType layers, DType rows, const MixJob& job, int threads);
  bool (*dots)(DType grad, DType layers, const DotsJob& job, int threads);
  bool (*layer_grads)(DType grad, DType layers, const LayerGradsJob& job, int threads);
  // The Linear of the mixed rows `first_row` and on, which are computed as it reads them. Where a norm is given, its
  // statistics are.
  bool (*mixed_linear)(const Product& product, DType layers, const MixSource& source, int64_t first_row,
                       const Operand& w, const LinearEnd& end, int threads);
  // The gradient of that Linear's weight: x @ mixed rows, where x is the gradient of its result, transposed.
  bool (*mixed_linear_grad)(const Product& product, const Operand& x, DType layers, const MixSource& source,
                            const Matrix& grad, int threads);
  // The dots of x @ w^T, which is the gradient of the mixed rows: dots[row, tile of the columns, e].
  bool (*linear_dots)(const Product& product, const Operand& x, const Operand& w, DType layers, const DotsJob& job,
                      int threads);
};

} // namespace igva::cpu
