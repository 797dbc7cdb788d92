// Parameters of the Hopper GEMM around the mix (gemm_sm90.cu).
#pragma once

#include "common/activations.h"
#include "gemm/hopper.h"
#include "weighted_mix/cuda/params.h"

namespace igva::cuda {

constexpr int gemm_mix_rows = 2; // rows that a warp mixes for one count of a flag
constexpr int gemm_max_taps = 8;

// The counters of a launch: the ticket, the clusters that are done, and from gemm_first_flag on, in another line of the
// cache, one flag per tile of rows, of whole clusters.
constexpr int gemm_first_flag = 32;
// Counters in the module's own memory, which launches take parts of.
constexpr int gemm_counters = 1 << 18;

// A block of A: where the copy engine finds it and which columns of W it meets.
struct GemmBlock {
  int32_t map;      // among GemmParams::a
  int32_t offset;   // its first column there
  int32_t position; // in the mixed row
  int32_t mixed;    // it is in F
};

// 5.5 KB: more than the 4 KB of old drivers, but every driver for Hopper with CUDA 12.1 or newer allows it.
struct GemmParams {
  CUtensorMap a[gemm_max_taps + 1]; // the taps, then F
  CUtensorMap w;
  GemmBlock blocks[2 * gemm_max_taps]; // in the order in which they are multiplied: the mixed ones last
  int32_t num_blocks;
  int32_t width;   // D
  int32_t rows;    // B * T
  int32_t tokens;  // T
  int32_t skip;
  int32_t columns; // H
  int32_t grid;    // a multiple of the cluster
  Activation activation; // none or gelu
  const void* bias;      // [H] or null
  void* y;               // [B * P, H]
  void* z;               // or null; only with an activation
  int32_t* counters;     // zero before and after the launch; null: at first_counter of the module's own
  int32_t first_counter;
  MixParams mix; // rows is F; num_terms == 0 without mixed blocks
};
static_assert(sizeof(GemmParams) <= 32764);

// `tile_n` is gemm_wide or gemm_narrow.
int gemm_sm90(const GemmParams& params, int tile_n, DType dtype, Stream stream);

} // namespace igva::cuda
