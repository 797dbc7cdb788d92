// Arguments of the kernels: raw pointers, sizes and strides (in elements), shared by every device.
//
// Symbols: B rows of the batch, I images, P patches (tokens that are not skipped), D width of a layer, G blocks.
#pragma once

#include <cstdint>

namespace igva {

enum class DType : int32_t { f32, bf16, f16, f64 };

enum class Activation : int32_t { none, gelu, gelu_tanh, relu, silu };

// One hidden state [I, P, D], last dimension contiguous; `data` stands on the first token that is not skipped.
struct Layer {
  const void* data;
  int64_t image_stride;
  int64_t token_stride;
};

// scale * weights[:, column] * sum of layers term_layers[begin:end]; column -1 is the constant weight 1.
struct Term {
  int32_t column;
  int32_t begin;
  int32_t end;
  double scale;
};

// A plan in tables: block g of the mixed row is the sum of terms[block_begin[g]:block_begin[g + 1]].
// Blocks 0..num_blocks-1 make the mixed row; the num_sums blocks after them are weight-free sums to be kept.
struct Program {
  const Term* terms;
  const int32_t* term_layers;
  const int32_t* block_begin;
  int32_t num_blocks;
  int32_t num_sums;
  int32_t longest_term; // in layers: a term may name one more often than once
};

// weights[b, c] at data[b * row_stride + c * column_stride].
struct MixWeights {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
};

// Patches patch..patch+patches of one image, for the batch rows batch_rows[begin:end] that read it.
struct Tile {
  int64_t image;
  int64_t patch;
  int64_t patches;
  int64_t begin;
  int64_t end;
};

struct MixArgs {
  Program program;
  const Layer* layers;
  MixWeights weights;
  const Tile* tiles; // each patch of each image in one tile at most
  int64_t num_tiles;
  const int64_t* batch_rows;
  int64_t num_patches;
  int64_t width;
  int64_t first_row; // row b * P + p of the mixed rows lies at rows[b * P + p - first_row]
  void* rows;        // [.., G * D]
  void* const* sums; // num_sums of [I, P, D], in the layers' dtype
  bool normalize;
  const void* norm_weight; // [G * D] in the accumulation dtype, or null
  const void* norm_bias;
  double eps;
  void* raw_rows; // the rows before the norm, laid out as rows, or null
  void* mean;     // [B * P] in the accumulation dtype
  void* rstd;
  void* scratch; // scratch_stride elements of the accumulation dtype a thread: a tile of a block, with a norm of a row
  int64_t scratch_stride;
  const void** row_pointers; // threads * longest_term
  bool stream;               // write around the cache; rows and sums start at 64 bytes
};

// y = act(x) and a copy of x as z, rounded alike; matrices [rows, columns], last dimension contiguous.
struct EpilogueArgs {
  int64_t rows;
  int64_t columns;
  const void* x;
  int64_t x_stride;
  Activation activation;
  void* y;
  int64_t y_stride;
  void* z; // or null
  int64_t z_stride;
};

// grad_z = grad_y * act'(z), y = act(z); matrices [rows, columns], last dimension contiguous.
struct ActivationGradArgs {
  int64_t rows;
  int64_t columns;
  const void* grad_y;
  int64_t grad_y_stride;
  const void* z;
  int64_t z_stride;
  Activation activation;
  void* grad_z;
  int64_t grad_z_stride;
  void* y; // or null
  int64_t y_stride;
};

// dots[b, chunk, e] = sum over the patches p of the chunk and d of grad[b, p, offset_e + d] * layer_e[image(b), p, d].
struct DotsArgs {
  int64_t batch;
  int64_t num_patches;
  int64_t width;
  int64_t chunk; // patches a chunk
  const void* grad;
  int64_t grad_batch_stride;
  int64_t grad_token_stride;
  const int64_t* image_index; // [B], or null where row b reads image b
  int32_t num_entries;
  const int64_t* offsets; // [num_entries]
  const Layer* layers;    // [num_entries]
  double* dots;
};

// grads[s][i, skip + p, d] = sum over the rows b of image i and the entries of signature s of
// scale * weights[b, column] * grad[b, p, block * D + d]; skipped tokens get zeros.
struct GradEntry {
  int32_t block;
  int32_t column;
  double scale;
};

struct LayerGradsArgs {
  int64_t num_images;
  int64_t num_patches;
  int64_t skip;
  int64_t width;
  const void* grad; // [B, P, G * D]
  int64_t grad_batch_stride;
  int64_t grad_token_stride;
  const int64_t* image_rows;  // batch rows sorted by image, in row order
  const int64_t* image_begin; // [I + 1]
  MixWeights weights;
  int32_t num_signatures;
  const int32_t* signature_begin; // [num_signatures + 1]
  const GradEntry* entries;
  void* const* grads; // num_signatures of [I, T, D]
};

} // namespace igva
