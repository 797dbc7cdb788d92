// The CPU kernels of deformable attention, of one instruction set, and the jobs that they are given. The levels, the
// output and its gradient have one dtype; all else has the accumulation dtype.
#pragma once

#include "deform_attn/operands.h"

namespace igva::cpu {

// Rows of scratch memory hold the channels of one head, filled up to a multiple of this many elements.
constexpr int64_t row_multiple = 16;

// Where every query and head reads, and with which weights.
struct Sampling {
  DType dtype; // of the levels
  int64_t batch;
  int64_t queries;
  int64_t heads;
  int64_t width;      // of a head
  int64_t num_points; // of a query and head, in all levels
  Origin origin;
  bool softmax;
  View offsets;   // [B, Q, heads * points * 2]
  View logits;    // [B, Q, heads * points]
  View reference; // [B, Q, levels * 2], or * 4 for boxes; null without
  void* weights;  // [B, Q, heads * points], dense: memory for the softmax; null without softmax
  void* scratch;  // as much for each thread as attend_scratch or attend_grad_scratch asks for
  const Level* levels;
  int64_t num_levels;
};

struct AttendJob {
  Sampling sampling;
  int64_t slices; // into which the queries of a head are cut
  void* out;      // [B, Q, heads * width], dense
};

struct AttendGradJob {
  Sampling sampling;
  View grad;                // [B, Q, heads * width]
  const Level* grad_levels; // as many as levels, or null
  bool in_pixels;           // see op.py
  void* grad_offsets;       // dense, or null
  void* grad_logits;        // dense, or null
};

struct DeformKernels {
  bool (*attend)(const AttendJob& job, int threads);
  bool (*attend_grad)(const AttendGradJob& job, int threads);
};

} // namespace igva::cpu

// No instruction set may take another's functions, so that these are not shared.
namespace {

inline int64_t row_elements(const igva::cpu::Sampling& s) {
  return (s.width + igva::cpu::row_multiple - 1) / igva::cpu::row_multiple * igva::cpu::row_multiple;
}

inline int64_t rows_of(const igva::Level& level) { return int64_t(level.height) * level.width; }

// A level is copied for a head, in the accumulation dtype and without gaps, where it is read often enough.
inline bool is_copied(const igva::cpu::Sampling& s, const igva::Level& level) {
  return 2 * s.queries * level.points >= rows_of(level);
}

// The largest copy of a level's channels of one head, in elements. Vectors that do not divide a row need a copy, too.
inline int64_t copy_elements(const igva::cpu::Sampling& s) {
  int64_t most = 0;
  for (int64_t l = 0; l < s.num_levels; ++l) {
    const bool copied = s.width % igva::cpu::row_multiple || is_copied(s, s.levels[l]);
    if (copied && rows_of(s.levels[l]) > most) most = rows_of(s.levels[l]);
  }
  return most * row_elements(s);
}

// Scratch memory of one thread, in elements.
inline int64_t attend_scratch(const igva::cpu::Sampling& s, int64_t slices) {
  return (1 + (s.queries + slices - 1) / slices) * row_elements(s) + copy_elements(s);
}

// The same: `dots` for the gradients of offsets or logits, `sums` for those of the levels.
inline int64_t attend_grad_scratch(const igva::cpu::Sampling& s, bool dots, bool sums) {
  int64_t most = 0;
  for (int64_t l = 0; sums && l < s.num_levels; ++l) most = rows_of(s.levels[l]) > most ? rows_of(s.levels[l]) : most;
  return (3 + most) * row_elements(s) + (dots ? copy_elements(s) : 0);
}

} // namespace
