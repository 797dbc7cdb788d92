// Parameters of the CUDA kernels of deformable attention. The levels, the output and its gradient have one dtype;
// offsets, logits, references and their gradients have its accumulation dtype.
#pragma once

#include <cstdint>

#include "common/operands.h"
#include "cuda/host.h"
#include "deform_attn/operands.h"

namespace igva::cuda {

constexpr int max_levels = 64; // of one call: kernels have 4 KB of parameters

// Where every query reads, and which levels.
struct Sampling {
  DType dtype;
  Origin origin;
  bool softmax;
  bool vector; // whether all rows of a head may be accessed 16 bytes at a time
  int32_t batch;
  int32_t queries;
  int32_t heads;
  int32_t width; // of a head
  int32_t num_points; // of all levels
  int32_t num_levels;
  View offsets;   // [batch, queries, heads * num_points * 2]
  View logits;    // [batch, queries, heads * num_points]
  View reference; // [batch, queries, num_levels * 2 or 4], where the origin is points or boxes
  Level levels[max_levels];
};

// How the work is cut: blocks of threads own an image, a head, a part of its channels and a slice of the queries.
struct Split {
  int32_t parts;
  int32_t vectors; // of channels in a part; fewer in the last one
  int32_t slices;
  int32_t queries; // in a slice; fewer in the last one
};

struct AttendParams {
  Sampling sampling;
  Split split;
  void* out; // [batch, queries, heads * width], dense
};

// The gradients of the offsets (of positions in pixels if `in_pixels`) and of the logits.
struct PlacesGradParams {
  Sampling sampling;
  Split split; // of one part
  View grad;   // [batch, queries, heads * width]
  bool in_pixels;
  void* grad_offsets; // dense, or null
  void* grad_logits;  // dense, or null
};

// What the gradients of the levels need of a point; it is read at once.
template <class W>
struct alignas(16) Entry {
  W right; // the place within its cell
  W down;
  W weight;
  int32_t query;
};

// The gradients of the levels, which are those of `sampling`.
struct LevelsGradParams {
  Sampling sampling;
  Split split; // of one slice
  View grad;
  int32_t levels_per_block;
};

// The same through memory. A cell has a number among those of all images, heads and levels: level by level within a
// head, (height + 1) * (width + 1) of each.
struct PointsParams {
  Sampling sampling;
  int32_t* cells; // [batch, queries, heads, num_points]: of each point; INT32_MAX where it reads nothing
  void* entries;  // the points, as `Entry`
};
struct SortedGradParams {
  Sampling sampling;
  Split split; // slices are of the pixels
  View grad;
  const int64_t* order;  // the points in the order of their cells, and within a cell in that of their numbers
  const int32_t* starts; // of each cell in it, and the end of the last one
  const void* entries;
};

// Launchers.
int attend(AttendParams params, const Card& card, Stream stream);
int places_grad(PlacesGradParams params, const Card& card, Stream stream);
// Where a head's gradients and points fit the shared memory of a block; otherwise it does nothing, and `fits` is false.
int levels_grad(LevelsGradParams params, const Card& card, bool& fits, Stream stream);
int points(const PointsParams& params, Stream stream);
int sorted_grad(SortedGradParams params, Stream stream);

} // namespace igva::cuda
