// Parameters of the CUDA kernels, passed by value: plans and pointer lists travel in the kernel's parameter space (4 KB),
// so that a launch copies nothing to the device and can be captured in a graph.
//
// Symbols as in args.h; T tokens of a hidden state, P = T - skip, M = B * P, C weight columns.
#pragma once

#include <cstdint>

#include "igva/args.h"

namespace igva::cuda {

constexpr int max_layers = 72;
constexpr int max_entries = 160; // layers of all terms together
constexpr int max_terms = 96;
constexpr int max_sums = 32;
constexpr int max_dots = 64;
constexpr int max_signatures = 72;
constexpr int max_grad_entries = 160;

// scale * sum of the layers entries[end of the term before : end]. Terms of one weight column are adjacent, a "part".
struct MixTerm {
  double scale;
  int16_t column;    // of the part; -1 is the constant weight 1
  uint8_t end;
  int8_t sum;        // at the end of a part: which kept sum it is, or -1
  uint8_t ends_part; // the part is complete: keep it, weigh it, add it to the block
  uint8_t ends_block;
};

// One launch covers the rows m = b * P + p of `rows` (norm included), or, with rows == nullptr, only the kept sums.
struct MixParams {
  Layer layers[max_layers]; // `data` stands on the first token that is not skipped
  MixTerm terms[max_terms];
  uint8_t entries[max_entries];
  void* sums[max_sums]; // [I, P, D] in the layers' dtype
  int32_t num_terms;
  int32_t num_blocks;
  MixWeights weights;         // fp32, or fp64 where the layers are
  const int64_t* image_index; // [B], or null where row b reads image b
  int64_t num_images;
  int32_t num_rows; // M
  int32_t num_patches;
  int32_t width;
  DType out;
  void* rows; // [M, G * D]
};

struct NormParams {
  const void* weight; // [G * D] or null
  const void* bias;
  DType weight_dtype;
  DType bias_dtype;
  double eps;
  void* raw_rows; // [M, G * D] before the norm, or null
  void* mean;     // [M], fp32, or fp64 where the layers are
  void* rstd;
};

// grad_rows = rstd * (g - mean(g) - n * mean(g * n)), g = grad * weight, n = (rows - mean) * rstd.
struct NormGradParams {
  int64_t num_rows;
  int32_t width; // of a row: G * D
  const void* grad;
  const void* rows;
  const void* mean;
  const void* rstd;
  const void* weight; // or null
  DType weight_dtype;
  void* grad_rows;
  void* partials; // [chunks, 2, width], sums over `chunk` rows of grad * n and of grad; or null
  int32_t chunk;
};

// y = act(z), over `count` adjacent elements; y may be z.
struct ActivationParams {
  int64_t count;
  Activation activation;
  const void* z;
  void* y;
};

// grad_z = grad_y * act'(z), y = act(z) (or y null), all [rows, columns]; grad_z may be grad_y.
struct ActivationGradParams {
  int64_t rows;
  int32_t columns;
  Activation activation;
  const void* grad_y;
  const void* z;
  void* grad_z;
  void* y;
  void* partials; // [chunks, columns], sums of the unrounded grad_z over `chunk` rows, fp32 or fp64; or null
  int32_t chunk;
};

struct Dot {
  int32_t block;  // position in grad
  int16_t layer;
  int16_t column;
  double scale;
};

// partials[b, chunk, e] = sum over the patches of the chunk and d of grad[b, p, block_e * D + d] * layer_e[image(b), p, d],
// then grad_weights[b, c] = sum over the dots e of column c and the chunks, in that order, of scale_e * partial.
struct DotsParams {
  Layer layers[max_dots];
  Dot dots[max_dots];
  int32_t num_dots;
  int32_t num_columns;
  const int64_t* image_index;
  int64_t num_images;
  int32_t batch;
  int32_t num_patches;
  int32_t width;
  int32_t chunk;
  const void* grad;
  int64_t grad_batch_stride;
  int64_t grad_token_stride;
  double* partials;
  void* grad_weights; // [B, C], fp32 or fp64
};

// grads[s][i, skip + p, d] = sum over the rows b of image i and the entries of signature s of
// scale * weights[b, column] * grad[b, p, block * D + d]; skipped tokens get zeros.
struct LayerGradsParams {
  GradEntry entries[max_grad_entries];
  void* grads[max_signatures];
  uint8_t signature_end[max_signatures];
  int32_t num_signatures;
  const int64_t* image_index;
  MixWeights weights;
  int32_t batch;
  int32_t num_images;
  int32_t num_tokens;
  int32_t skip;
  int32_t width;
  DType out;
  const void* grad;
  int64_t grad_batch_stride;
  int64_t grad_token_stride;
};

static_assert(sizeof(MixParams) + sizeof(NormParams) <= 4096 && sizeof(DotsParams) <= 4096 &&
                  sizeof(LayerGradsParams) <= 4096,
              "kernel parameters of every CUDA version hold 4 KB");

// Launchers: they queue work on `stream` of the current device and return its error, cudaSuccess being 0. `vector` asks
// for 16-byte accesses, which all addresses and strides must allow.
using Stream = void*;

int mix(const MixParams& params, DType layers, bool vector, Stream stream);
int mix_norm(const MixParams& params, const NormParams& norm, DType layers, bool vector, Stream stream);
int norm_grad(const NormGradParams& params, DType dtype, bool vector, Stream stream);
int activation(const ActivationParams& params, DType dtype, Stream stream);
int activation_grad(const ActivationGradParams& params, DType dtype, bool vector, Stream stream);
int mix_weights_grad(const DotsParams& params, DType grad, DType layers, bool vector, Stream stream);
int layer_grads(const LayerGradsParams& params, DType grad, bool vector, Stream stream);

} // namespace igva::cuda
