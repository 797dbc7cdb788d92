// Parameters of the CUDA kernels of the mix, passed by value: plans and pointer lists travel in the parameter space of
// the kernel (4 KB), so that a launch copies nothing to the device and can be captured in a graph.
//
// Symbols as in weighted_mix/operands.h.
#pragma once

#include <cstdint>

#include "common/operands.h"
#include "cuda/host.h"
#include "weighted_mix/operands.h"

namespace igva::cuda {

// How much of a plan the parameters hold: as much as their 4 KB allow, and more than any published plan needs.
constexpr int max_layers = 72;
constexpr int max_entries = 160; // layers of all terms together
constexpr int max_terms = 96;
constexpr int max_sums = 32;
constexpr int max_dots = 64; // weighted entries of all blocks that a launch takes
constexpr int max_grads = 72; // different gradients of layers
constexpr int max_shares = 160; // of all gradients of layers together

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
  Layer layers[max_layers]; // `data` points to the first token that is not skipped
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
  void* rows;     // [M, G * D]
  void* raw_rows; // [M, G * D] before the norm, or null; only for mix_norm
};

struct Dot {
  int32_t block; // position in grad
  int32_t column;
  double scale;
};

// partials[b, chunk, e] = sum over the chunk's patches and d of grad[b, p, block_e * D + d] * layer_e[image(b), p, d],
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
  int32_t chunk; // patches per chunk
  View grad;
  double* partials;
  void* grad_weights; // [B, C], fp32 or fp64
};

// grads[s][i, skip + p, d] = sum over the rows b of image i and the shares of gradient s of
// scale * weights[b, column] * grad[b, p, block * D + d]; skipped tokens get zeros.
struct LayerGradsParams {
  Share shares[max_shares];
  void* grads[max_grads];
  uint8_t share_end[max_grads];
  int32_t num_grads;
  const int64_t* image_index;
  MixWeights weights;
  int32_t batch;
  int32_t num_images;
  int32_t num_tokens;
  int32_t skip;
  int32_t width;
  DType out;
  View grad;
};

static_assert(sizeof(MixParams) + sizeof(Norm) <= 4096 && sizeof(DotsParams) <= 4096 && sizeof(LayerGradsParams) <= 4096,
              "kernel parameters of every CUDA version hold 4 KB");

// Launchers. `vector` asks for 16-byte accesses, which all addresses and strides must allow.
int mix(const MixParams& params, DType layers, bool vector, Stream stream);
int mix_norm(const MixParams& params, const Norm& norm, DType layers, bool vector, Stream stream);
int mix_weights_grad(const DotsParams& params, DType layers, bool vector, Stream stream);
int layer_grads(const LayerGradsParams& params, bool vector, Stream stream);

} // namespace igva::cuda
