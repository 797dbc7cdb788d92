// What the kernels of deformable attention share: where a point lies, its weight, the corners of its cell, and the
// share of a block.
//
// A query of a head belongs to a group of lanes, each of which has one vector of its channels. The lanes of a group
// place one point each, and then take all of them by shuffles.
#pragma once

#include "cuda/common.cuh"
#include "deform_attn/cuda/params.h"

namespace igva::cuda {

constexpr unsigned all_lanes = 0xffffffffu;

template <int G, class W>
__device__ inline W group_sum(W value) {
#pragma unroll
  for (int lanes = G / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(all_lanes, value, lanes);
  return value;
}

template <class W>
__device__ inline const W* row_of(const View& view, int b, int q) {
  return static_cast<const W*>(view.data) + b * view.batch_stride + q * view.token_stride;
}

// ---- the share of a block --------------------------------------------------------------------------------------------

struct Owner {
  int b;
  int h;
  int channel; // the first one of its part
  int vectors; // of its part
  int first; // of its slice
  int count; // in its slice
};

template <int V>
__device__ inline Owner owner_of(const Sampling& s, const Split& split, int64_t block, int slice_of) {
  Owner own;
  own.first = int(block % split.slices) * split.queries;
  block /= split.slices;
  const int part = int(block % split.parts) * split.vectors;
  block /= split.parts;
  own.h = int(block % s.heads);
  own.b = int(block / s.heads);
  own.channel = part * V;
  own.vectors = min(split.vectors, s.width / V - part);
  own.count = min(split.queries, slice_of - own.first);
  return own;
}

// A block per image, head, part and slice.
inline dim3 blocks_of(const Sampling& s, const Split& split) {
  return dim3(unsigned(int64_t(s.batch) * s.heads * split.parts * split.slices));
}

inline __host__ __device__ int chunks(int64_t count, int64_t size) { return int((count + size - 1) / size); }

// The fewest parts of at most `most` vectors, all of about one size.
inline Split split_channels(int vectors, int most) {
  const int parts = chunks(vectors, most);
  return {parts, chunks(vectors, parts), 1, 0};
}

inline void split_into(Split& split, int count, int size) {
  split.queries = size;
  split.slices = chunks(count, size);
}

template <class T>
__device__ inline T* head_of(const Level& level, int b, int h) {
  return static_cast<T*>(level.data) + b * level.batch_stride + h * level.head_stride;
}

inline __host__ __device__ int pixels_of(const Level& level) { return level.height * level.width; }
inline __host__ __device__ int cells_of(const Level& level) { return (level.height + 1) * (level.width + 1); }

inline int most_pixels(const Sampling& s) {
  int most = 0;
  for (int l = 0; l < s.num_levels; ++l) most = max(most, pixels_of(s.levels[l]));
  return most;
}

// Whether queries are to read the levels in shared memory: `shared` bytes of it, and at least as many corners as it takes
// loads to bring them there.
inline bool is_resident(const Sampling& s, size_t shared, const Card& card) {
  int64_t corners = 0, pixels = 0;
  for (int l = 0; l < s.num_levels; ++l) {
    corners += int64_t(4) * s.queries * s.levels[l].points;
    pixels += pixels_of(s.levels[l]);
  }
  return shared <= card.shared && corners >= pixels;
}

// Slices of the queries for kernels that load a level per slice: `groups` queries at a time, as often as `passes` at
// most, and less often where there are too few blocks for the card.
inline void split_queries(const Sampling& s, Split& split, int groups, int passes, const Card& card) {
  const int64_t owners = int64_t(s.batch) * s.heads * split.parts;
  const int least = chunks(s.queries, groups * passes), most = chunks(s.queries, groups);
  const int slices = min(max(least, chunks(card.multiprocessors, owners)), most);
  split_into(split, s.queries, chunks(s.queries, slices));
}

// ---- weights ---------------------------------------------------------------------------------------------------------

// What the weights of a query and head are computed with.
template <class W>
struct Softmax {
  W most;
  W sum; // of the exponentials; 0 where the logits are the weights
  __device__ W weight(W logit) const { return sum == 0 ? logit : exp(logit - most) / sum; }
};

template <int G, class W>
__device__ inline Softmax<W> softmax_of(const Sampling& s, const W* logits) {
  if (!s.softmax) return {0, 0};
  const int lane = threadIdx.x % G;
  W most = W(-INFINITY), sum = 0;
  for (int i = lane; i < s.num_points; i += G) most = max(most, logits[i]);
#pragma unroll
  for (int lanes = G / 2; lanes > 0; lanes /= 2) most = max(most, __shfl_xor_sync(all_lanes, most, lanes));
  for (int i = lane; i < s.num_points; i += G) sum += exp(logits[i] - most);
  return {most, group_sum<G>(sum)};
}

// ---- positions -------------------------------------------------------------------------------------------------------

// A product that is rounded before it is added to anything, as plain torch rounds it: near a kink of the interpolation
// the derivative depends on it.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// The cell in which a point lies, by the pixel that is its upper left corner, and the place within it, from 0 to 1.
template <class W>
struct Position {
  int32_t x; // from -1 on
  int32_t y;
  bool is_inside; // whether some corner is
  W right; // 0 where no corner is inside, and NaN where the position is NaN
  W down;
};

template <class W>
struct Axis {
  W floor;
  W within;
};

// Along one axis of a level of `size` pixels; `step` becomes how many pixels a unit of the offset is.
template <class W>
__device__ inline Axis<W> along(Origin origin, W offset, int own, const W* reference, int size, int points, W& step) {
  step = 1;
  if (origin == Origin::grid) { // the query's own pixel is a whole number, so that nothing is rounded
    const W whole = floor(offset);
    return {W(own) + whole, offset - whole};
  }
  W position;
  if (origin == Origin::image) {
    step = W(size);
    position = rounded_product(offset, step) - W(0.5);
  } else {
    position = rounded_product(reference[0], W(size)) - W(0.5);
    if (origin == Origin::boxes) {
      const W box = (rounded_product(reference[2], W(size)) - W(0.5)) + W(0.5);
      step = rounded_product(box, W(0.5) / W(points));
    }
    position += rounded_product(step, offset);
  }
  const W whole = floor(position);
  return {whole, position - whole};
}

// Of a point of a query, whose offset is (offset[0], offset[1]); `steps` become pixels per unit of the offset.
template <class W>
__device__ inline Position<W> position_of(const Sampling& s, int index, int b, int q, const W* offset, W (&steps)[2]) {
  const Level& level = s.levels[index];
  int own_x = 0, own_y = 0;
  const W* reference = nullptr;
  if (s.origin == Origin::grid) {
    own_y = q / level.width;
    own_x = q - own_y * level.width;
  } else if (s.origin != Origin::image) {
    reference = row_of<W>(s.reference, b, q) + index * (s.origin == Origin::boxes ? 4 : 2);
  }
  const Axis<W> x = along(s.origin, offset[0], own_x, reference, level.width, level.points, steps[0]);
  const W* below = reference == nullptr ? nullptr : reference + 1;
  const Axis<W> y = along(s.origin, offset[1], own_y, below, level.height, level.points, steps[1]);
  // Only what is in range is converted to an integer.
  const bool is_inside = x.floor >= -1 && x.floor < W(level.width) && y.floor >= -1 && y.floor < W(level.height);
  if (is_inside) return {int32_t(x.floor), int32_t(y.floor), true, x.within, y.within};
  const bool is_nan = x.floor != x.floor || y.floor != y.floor;
  const W within = is_nan ? W(NAN) : W(0);
  return {0, 0, false, within, within};
}

// A point as the lanes of a group hand it round.
template <class W>
struct Point {
  int32_t place; // 16 times the upper left pixel, and a bit for each corner that exists: 1 that one, 2 the one to its
                 // right, 4 and 8 those below
  W right;
  W down;
  W weight;

  __device__ Point from(int lane) const {
    return {__shfl_sync(all_lanes, place, lane), __shfl_sync(all_lanes, right, lane), __shfl_sync(all_lanes, down, lane),
            __shfl_sync(all_lanes, weight, lane)};
  }
};

template <class W>
__device__ inline Point<W> point_of(const Level& level, const Position<W>& at, W weight) {
  int corners = 0;
  if (at.is_inside) {
    const int columns = int(at.x >= 0) | int(at.x + 1 < level.width) << 1;
    corners = (at.y >= 0 ? columns : 0) | (at.y + 1 < level.height ? columns << 2 : 0);
  }
  return {(at.y * level.width + at.x) * 16 + corners, at.right, at.down, weight};
}

// Where the points of a query and head begin among those of all heads.
__device__ inline int first_point(const Sampling& s, int h) { return h * s.num_points; }

// ---- corners ---------------------------------------------------------------------------------------------------------

// Calls f(corner, vector) for every corner of a point's cell that exists. `map` is the lane's first channel of the level;
// `stride` is that of its pixels, 32 bits of it in shared memory.
template <int V, class T, class Stride, class F>
__device__ inline void for_corners(const T* map, Stride stride, int width, int32_t place, F f) {
  const T* pixel = map + (place >> 4) * stride;
  const Stride below = width * stride;
  if ((place & 15) == 15) {
    const Vector<T, V> corners[4] = {fetch<V>(pixel), fetch<V>(pixel + stride), fetch<V>(pixel + below),
                                     fetch<V>(pixel + below + stride)};
#pragma unroll
    for (int i = 0; i < 4; ++i) f(i, corners[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (place >> i & 1) f(i, fetch<V>(pixel + (i & 1 ? stride : 0) + (i & 2 ? below : 0)));
  }
}

// Loads the lane's vector of every pixel of a level into shared memory, the group's lanes side by side.
template <class T, int V, int G>
__device__ inline void load_map(const Level& level, const Owner& own, T* map) {
  const int lane = threadIdx.x % G;
  const T* from = head_of<const T>(level, own.b, own.h) + own.channel;
  const int stride = own.vectors * V;
  for (int v = lane; v < own.vectors; v += G) {
    for (int row = threadIdx.x / G; row < pixels_of(level); row += block_threads / G) {
      copy_async(reinterpret_cast<Vector<T, V>*>(map + row * stride + v * V),
                 reinterpret_cast<const Vector<T, V>*>(from + row * level.row_stride + v * V));
    }
  }
  wait_for_copies();
}

} // namespace igva::cuda
