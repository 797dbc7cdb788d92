// Deformable attention: a thread owns one head of one image at a time, and reads its levels one after the other.
//
// A head's channels of one level are first copied to where they lie without gaps, in the accumulation dtype: of a ViT's
// map that is 147 KB, which stays in the cache of a core while all queries read it, and no row of which competes for the
// same cache lines as the next one, as rows that are a power of two apart do. In the backward the owner of a level adds
// up its gradient in such a copy, query by query, so that the result does not depend on the number of threads.
//
// Floor of MMFuser's shape (B 1, 576 queries, 16 heads of 64, 4 levels of 24 x 24, 4 points): 147,456 points x 4 corners
// x 64 channels = 37.7 MFMA and as many loads in the forward, three times the FMAs and twice the loads with as many
// stores in the backward.
#pragma once

#include "cpu/parallel.h"
#include "cpu/vector_loops.h"
#include "deform_attn/cpu/table.h"

namespace {

using namespace igva::cpu;

inline float round_down(float x) { return __builtin_floorf(x); }
inline double round_down(double x) { return __builtin_floor(x); }

// The cell of a level in which a point lies.
template <class W>
struct Cell {
  enum { outside, inside, nowhere } state; // nowhere: its position is NaN
  int32_t x;
  int32_t y;
  W right; // from 0 to 1, within the cell
  W down;
};

// What a query says about a level.
template <class W>
struct Query {
  Origin origin;
  W x; // positions are (x, y) + step * offset
  W y;
  W step_x;
  W step_y;
};

template <class W>
inline const W* row_of(const View& view, int64_t b, int64_t q) {
  return static_cast<const W*>(view.data) + b * view.batch_stride + q * view.token_stride;
}

template <class W>
inline Query<W> query_of(const Sampling& s, const Level& level, int64_t index, int64_t b, int64_t q) {
  const W width = W(level.width), height = W(level.height);
  if (s.origin == Origin::grid) return {s.origin, W(q % level.width), W(q / level.width), 1, 1};
  if (s.origin == Origin::image) return {s.origin, W(-0.5), W(-0.5), width, height};
  const bool boxes = s.origin == Origin::boxes;
  const W* reference = row_of<W>(s.reference, b, q) + index * (boxes ? 4 : 2);
  const W x = width * reference[0] - W(0.5), y = height * reference[1] - W(0.5);
  if (!boxes) return {s.origin, x, y, 1, 1};
  const W half = W(0.5) / W(level.points ? level.points : 1);
  return {s.origin, x, y, width * reference[2] * half, height * reference[3] * half};
}

template <class W>
inline Cell<W> cell_of(const Query<W>& query, const Level& level, const W* offset) {
  W x, y, right, down;
  if (query.origin == Origin::grid) { // the query's own pixel is a whole number, so that nothing is rounded
    const W whole_x = round_down(offset[0]), whole_y = round_down(offset[1]);
    right = offset[0] - whole_x;
    down = offset[1] - whole_y;
    x = query.x + whole_x;
    y = query.y + whole_y;
  } else {
    const W at_x = query.x + query.step_x * offset[0], at_y = query.y + query.step_y * offset[1];
    x = round_down(at_x);
    y = round_down(at_y);
    right = at_x - x;
    down = at_y - y;
  }
  // Only what is in range is converted to an integer.
  if (x >= -1 && x < W(level.width) && y >= -1 && y < W(level.height)) {
    return {Cell<W>::inside, int32_t(x), int32_t(y), right, down};
  }
  return {x != x || y != y ? Cell<W>::nowhere : Cell<W>::outside, 0, 0, right, down};
}

// The rows of a level that are the corners of a cell, -1 for one outside the map: upper left and right, lower left and
// right.
template <class W>
inline void corners_of(const Cell<W>& cell, const Level& level, int64_t (&rows)[4]) {
  const int64_t row = int64_t(cell.y) * level.width + cell.x;
  const bool exists = cell.state == Cell<W>::inside;
  const bool left = exists && cell.x >= 0, right = exists && cell.x + 1 < level.width;
  const bool up = cell.y >= 0, down = cell.y + 1 < level.height;
  rows[0] = left && up ? row : -1;
  rows[1] = right && up ? row + 1 : -1;
  rows[2] = left && down ? row + level.width : -1;
  rows[3] = right && down ? row + level.width + 1 : -1;
}

// Weights of the corners; all are NaN where the position is.
template <class W>
inline void weights_of(const Cell<W>& cell, W attention, W (&weights)[4]) {
  const W up = attention * (1 - cell.down), down = attention * cell.down;
  weights[0] = up * (1 - cell.right);
  weights[1] = up * cell.right;
  weights[2] = down * (1 - cell.right);
  weights[3] = down * cell.right;
}

// The channels of one head of a level, from its first row on.
template <class E>
struct Map {
  E* data;
  int64_t stride;
  E* none; // a row that stands for what is outside the map
  E* at(int64_t row) const { return row < 0 ? none : data + row * stride; }
};

template <class T>
inline T* head_of(const Level& level, int64_t b, int64_t h) {
  return static_cast<T*>(level.data) + b * level.batch_stride + h * level.head_stride;
}

// Fetches n elements that are read soon: rows a page apart are nothing that a CPU fetches by itself.
template <class T>
inline void fetch(const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
}

// How many rows or queries are fetched ahead.
constexpr int64_t ahead = 8;

template <class V, class T>
inline void copy_in(const Level& level, int64_t b, int64_t h, int64_t width, int64_t stride, typename V::Scalar* map) {
  const T* from = head_of<const T>(level, b, h);
  const int64_t rows = rows_of(level);
  for (int64_t row = 0; row < rows; ++row) {
    typename V::Scalar* to = map + row * stride;
    if (row + ahead < rows) fetch(from + (row + ahead) * level.row_stride, width);
    copy_row<V>(from + row * level.row_stride, width, to);
    for (int64_t i = width; i < stride; ++i) to[i] = 0;
  }
}

// The softmax of n logits.
template <class V, class W>
inline void softmax(const W* logits, int64_t n, W* weights) {
  const W lowest = W(-__builtin_inf());
  V most = V::set(lowest);
  for (int64_t i = 0; i < n; i += V::width) {
    const V v = load_or<V>(logits + i, n - i, lowest);
    most = if_le(v, most, most, v); // a NaN is taken, and stays
  }
  W lanes[V::width], largest = lowest;
  most.store(lanes);
  for (int i = 0; i < V::width; ++i) largest = lanes[i] <= largest ? largest : lanes[i];
  const V shift = V::set(largest);
  V sum = V::set(0);
  for (int64_t i = 0; i < n; i += V::width) {
    const V e = exp(load_or<V>(logits + i, n - i, lowest) - shift);
    sum = sum + e;
    store(e, weights + i, n - i);
  }
  const V factor = V::set(1 / sum.sum());
  for (int64_t i = 0; i < n; i += V::width) store(load<V>(weights + i, n - i) * factor, weights + i, n - i);
}

// Queries that one task of the softmax takes.
constexpr int64_t softmax_queries = 16;

inline int64_t softmax_slices(const Sampling& s) { return (s.queries + softmax_queries - 1) / softmax_queries; }

inline int64_t softmax_tasks(const Sampling& s) { return s.softmax ? s.batch * softmax_slices(s) : 0; }

// The queries of an image that a task of the softmax takes.
struct SoftmaxShare {
  int64_t b;
  int64_t begin;
  int64_t end;
};

inline SoftmaxShare softmax_share(const Sampling& s, int64_t task) {
  const int64_t slices = softmax_slices(s), begin = task % slices * softmax_queries;
  return {task / slices, begin, begin + softmax_queries < s.queries ? begin + softmax_queries : s.queries};
}

template <class V>
inline void softmax_task(const Sampling& s, int64_t task) {
  using W = typename V::Scalar;
  const auto [b, begin, end] = softmax_share(s, task);
  for (int64_t q = begin; q < end; ++q) {
    const W* logits = row_of<W>(s.logits, b, q);
    W* weights = static_cast<W*>(s.weights) + (b * s.queries + q) * s.heads * s.num_points;
    for (int64_t h = 0; h < s.heads; ++h) softmax<V>(logits + h * s.num_points, s.num_points, weights + h * s.num_points);
  }
}

// The weights of the points of a query and head.
template <class W>
inline const W* attention_of(const Sampling& s, int64_t b, int64_t q, int64_t h) {
  if (!s.softmax) return row_of<W>(s.logits, b, q) + h * s.num_points;
  return static_cast<const W*>(s.weights) + ((b * s.queries + q) * s.heads + h) * s.num_points;
}

// What a query and head say about a level, ahead of time.
template <class W>
inline void fetch_query(const Sampling& s, const Level& level, int64_t b, int64_t q, int64_t h) {
  fetch(row_of<W>(s.offsets, b, q) + (h * s.num_points + level.first) * 2, level.points * 2);
  fetch(attention_of<W>(s, b, q, h) + level.first, level.points);
}

// ---- the output ------------------------------------------------------------------------------------------------------

constexpr int most_points = 16; // of a query that are read at a time

template <class E, class W>
struct Corners {
  const E* row[4];
  W weight[4];
};

// The sums of `vectors` vectors of channels over some points; `sum` is where they are kept between calls.
template <int vectors, class V, class E, class W>
inline void add_points(const Corners<E, W>* points, int count, int64_t at, bool is_first, W* sum) {
  V sums[vectors];
  for (int v = 0; v < vectors; ++v) sums[v] = is_first ? V::set(0) : V::load(sum + at + v * V::width);
  for (int n = 0; n < count; ++n) {
    for (int c = 0; c < 4; ++c) {
      const V weight = V::set(points[n].weight[c]);
      const E* row = points[n].row[c] + at;
      for (int v = 0; v < vectors; ++v) sums[v] = fma(weight, V::load(row + v * V::width), sums[v]);
    }
  }
  for (int v = 0; v < vectors; ++v) sums[v].store(sum + at + v * V::width);
}

template <class V, class E, class W>
inline void add_points(const Corners<E, W>* points, int count, int64_t width, bool is_first, W* sum) {
  int64_t at = 0;
  for (; at + 8 * V::width <= width; at += 8 * V::width) add_points<8, V>(points, count, at, is_first, sum);
  for (; at + 4 * V::width <= width; at += 4 * V::width) add_points<4, V>(points, count, at, is_first, sum);
  for (; at + 2 * V::width <= width; at += 2 * V::width) add_points<2, V>(points, count, at, is_first, sum);
  for (; at < width; at += V::width) add_points<1, V>(points, count, at, is_first, sum);
}

// Adds what the queries of a task read from a level to their sums, which lie `row` apart.
template <class V, class E>
inline void attend_level(const Sampling& s, const Level& level, int64_t index, const Map<const E>& map, int64_t b,
                         int64_t h, int64_t begin, int64_t end, bool is_first, typename V::Scalar* sums) {
  using W = typename V::Scalar;
  const int64_t row = row_elements(s);
  // A multiple of the width of a vector: what lies beyond the channels of a copy is zero.
  const int64_t width = (s.width + V::width - 1) / V::width * V::width;
  for (int64_t q = begin; q < end; ++q) {
    if (q + ahead < end) fetch_query<W>(s, level, b, q + ahead, h);
    const Query<W> query = query_of<W>(s, level, index, b, q);
    const W* offsets = row_of<W>(s.offsets, b, q) + (h * s.num_points + level.first) * 2;
    const W* attention = attention_of<W>(s, b, q, h) + level.first;
    W* sum = sums + (q - begin) * row;
    bool starts = is_first;
    int32_t n = 0;
    do {
      Corners<E, W> points[most_points];
      int count = 0;
      const int32_t stop = n + most_points < level.points ? n + most_points : level.points;
      for (; n < stop; ++n) {
        const Cell<W> cell = cell_of(query, level, offsets + 2 * n);
        if (cell.state == Cell<W>::outside && attention[n] == attention[n]) continue; // a weight of NaN shows
        Corners<E, W>& point = points[count++];
        int64_t rows[4];
        corners_of(cell, level, rows);
        weights_of(cell, attention[n], point.weight);
        for (int c = 0; c < 4; ++c) {
          point.row[c] = map.at(rows[c]);
          if (cell.state != Cell<W>::inside) point.weight[c] = W(__builtin_nan(""));
        }
      }
      add_points<V>(points, count, width, starts, sum);
      starts = false;
    } while (n < level.points);
  }
}

template <class V, class T>
void attend_task(const AttendJob& job, int64_t task, int thread) {
  using W = typename V::Scalar;
  const Sampling& s = job.sampling;
  const int64_t h = task / job.slices % s.heads, b = task / job.slices / s.heads;
  const int64_t slice = task % job.slices, row = row_elements(s);
  const int64_t begin = s.queries * slice / job.slices, end = s.queries * (slice + 1) / job.slices;
  const int64_t most = (s.queries + job.slices - 1) / job.slices;

  W* none = static_cast<W*>(s.scratch) + thread * attend_scratch(s, job.slices);
  W* sums = none + row;
  W* copy = sums + most * row;
  memset(none, 0, row * sizeof(W));
  bool is_first = true;
  for (int64_t l = 0; l < s.num_levels; ++l) {
    const Level& level = s.levels[l];
    if (s.width % V::width || is_copied(s, level)) {
      copy_in<V, T>(level, b, h, s.width, row, copy);
      attend_level<V, W>(s, level, l, {copy, row, none}, b, h, begin, end, is_first, sums);
    } else {
      const T* zeros = reinterpret_cast<const T*>(none);
      attend_level<V, T>(s, level, l, {head_of<const T>(level, b, h), level.row_stride, zeros}, b, h, begin, end,
                         is_first, sums);
    }
    is_first = false;
  }
  T* out = static_cast<T*>(job.out) + b * s.queries * s.heads * s.width + h * s.width;
  for (int64_t q = begin; q < end; ++q) copy_row<V>(sums + (q - begin) * row, s.width, out + q * s.heads * s.width);
}

bool attend(const AttendJob& job, int threads) {
  const Sampling& s = job.sampling;
  return dispatch(s.dtype, [&](auto x) {
    using T = decltype(x);
    using V = typename VecOf<T>::type;
    const auto count = [&](int64_t phase) { return phase == 0 ? softmax_tasks(s) : s.batch * s.heads * job.slices; };
    parallel_phases(2, threads, count, [&](int64_t phase, int64_t task, int thread) {
      if (phase == 0) softmax_task<V>(s, task);
      else attend_task<V, T>(job, task, thread);
    });
  });
}

// ---- the gradients ---------------------------------------------------------------------------------------------------

// For one point: the dot products of `grad` with its corners, and `grad` times their weights added to their gradients.
template <bool dots, bool sums, class V, class E, class W>
inline void visit(const W* grad, int64_t width, const E* const (&corner)[4], const W (&weight)[4], W* const (&to)[4],
                  W (&dot)[4]) {
  V total[4];
  for (int c = 0; c < 4; ++c) total[c] = V::set(0);
  for (int64_t i = 0; i < width; i += V::width) {
    const V g = V::load(grad + i);
    for (int c = 0; c < 4; ++c) {
      if (dots) total[c] = fma(g, V::load(corner[c] + i), total[c]);
      if (sums) fma(V::set(weight[c]), g, V::load(to[c] + i)).store(to[c] + i);
    }
  }
  if (!dots) return;
  for (int c = 0; c < 4; ++c) dot[c] = total[c].sum();
}

// The gradients of the points of all queries in a level, and that of the level in `grads`.
template <bool dots, bool sums, class V, class T, class E>
inline void grad_level(const AttendGradJob& job, int64_t index, const Map<const E>& map,
                       const Map<typename V::Scalar>& grads, int64_t b, int64_t h, typename V::Scalar* grad) {
  using W = typename V::Scalar;
  const Sampling& s = job.sampling;
  const Level& level = s.levels[index];
  const int64_t width = (s.width + V::width - 1) / V::width * V::width;
  W* grad_offsets = static_cast<W*>(job.grad_offsets);
  W* grad_logits = static_cast<W*>(job.grad_logits);
  for (int64_t i = s.width; i < width; ++i) grad[i] = 0;
  for (int64_t q = 0; q < s.queries; ++q) {
    if (q + ahead < s.queries) {
      fetch_query<W>(s, level, b, q + ahead, h);
      fetch(row_of<T>(job.grad, b, q + ahead) + h * s.width, s.width);
    }
    copy_row<V>(row_of<T>(job.grad, b, q) + h * s.width, s.width, grad);
    const Query<W> query = query_of<W>(s, level, index, b, q);
    const W step_x = job.in_pixels ? 1 : query.step_x, step_y = job.in_pixels ? 1 : query.step_y;
    const W* offsets = row_of<W>(s.offsets, b, q) + (h * s.num_points + level.first) * 2;
    const W* attention = attention_of<W>(s, b, q, h) + level.first;
    const int64_t first = ((b * s.queries + q) * s.heads + h) * s.num_points + level.first;
    for (int32_t n = 0; n < level.points; ++n) {
      const Cell<W> cell = cell_of(query, level, offsets + 2 * n);
      W dot[4] = {};
      if (cell.state == Cell<W>::inside) {
        int64_t rows[4];
        W weight[4];
        corners_of(cell, level, rows);
        weights_of(cell, attention[n], weight);
        const E* const corner[4] = {map.at(rows[0]), map.at(rows[1]), map.at(rows[2]), map.at(rows[3])};
        W* const to[4] = {grads.at(rows[0]), grads.at(rows[1]), grads.at(rows[2]), grads.at(rows[3])};
        visit<dots, sums, V>(grad, width, corner, weight, to, dot);
      } else if (cell.state == Cell<W>::nowhere) {
        for (int c = 0; c < 4; ++c) dot[c] = W(__builtin_nan(""));
      }
      if (!dots) continue;
      const W up = dot[1] - dot[0], down = dot[3] - dot[2];
      const bool exists = cell.state != Cell<W>::outside; // the place in its cell of an infinite position is NaN
      if (grad_offsets) {
        const W left = dot[2] - dot[0], right = dot[3] - dot[1];
        const W along_x = up + cell.down * (down - up), along_y = left + cell.right * (right - left);
        grad_offsets[2 * (first + n)] = exists ? step_x * attention[n] * along_x : 0;
        grad_offsets[2 * (first + n) + 1] = exists ? step_y * attention[n] * along_y : 0;
      }
      if (grad_logits) {
        const W upper = dot[0] + cell.right * up, lower = dot[2] + cell.right * down;
        grad_logits[first + n] = exists ? upper + cell.down * (lower - upper) : 0;
      }
    }
  }
}

template <class V, class T>
void attend_grad_task(const AttendGradJob& job, int64_t task, int thread) {
  using W = typename V::Scalar;
  const Sampling& s = job.sampling;
  const int64_t index = task % s.num_levels;
  const int64_t h = task / s.num_levels % s.heads, b = task / s.num_levels / s.heads;
  const Level& level = s.levels[index];
  const int64_t row = row_elements(s), rows = rows_of(level);
  const bool dots = job.grad_offsets || job.grad_logits, sums = job.grad_levels != nullptr;

  W* none = static_cast<W*>(s.scratch) + thread * attend_grad_scratch(s, dots, sums);
  W* grad = none + row;
  W* lost = grad + row; // gradients of what is outside the map
  W* total = lost + row;
  W* copy = total + (sums ? rows * row : 0);
  memset(none, 0, row * sizeof(W));
  memset(lost, 0, row * sizeof(W));
  if (sums) memset(total, 0, rows * row * sizeof(W));
  const Map<W> grads = {total, row, lost};
  if (!dots) {
    grad_level<false, true, V, T, W>(job, index, {none, 0, none}, grads, b, h, grad);
  } else if (s.width % V::width || is_copied(s, level)) {
    copy_in<V, T>(level, b, h, s.width, row, copy);
    const Map<const W> map = {copy, row, none};
    if (sums) grad_level<true, true, V, T, W>(job, index, map, grads, b, h, grad);
    else grad_level<true, false, V, T, W>(job, index, map, grads, b, h, grad);
  } else {
    const Map<const T> map = {head_of<const T>(level, b, h), level.row_stride, reinterpret_cast<const T*>(none)};
    if (sums) grad_level<true, true, V, T, T>(job, index, map, grads, b, h, grad);
    else grad_level<true, false, V, T, T>(job, index, map, grads, b, h, grad);
  }
  if (!sums) return;
  const Level& to = job.grad_levels[index];
  T* out = head_of<T>(to, b, h);
  for (int64_t i = 0; i < rows; ++i) copy_row<V>(total + i * row, s.width, out + i * to.row_stride);
}

// From the gradients of the weights to those of the logits, in place: g <- w (g - <w, g>).
template <class V>
inline void softmax_grad_task(const AttendGradJob& job, int64_t task) {
  using W = typename V::Scalar;
  const Sampling& s = job.sampling;
  const int64_t n = s.num_points;
  const auto [b, begin, end] = softmax_share(s, task);
  for (int64_t i = (b * s.queries + begin) * s.heads; i < (b * s.queries + end) * s.heads; ++i) {
    const W* weights = static_cast<const W*>(s.weights) + i * n;
    W* grads = static_cast<W*>(job.grad_logits) + i * n;
    const V mean = V::set(sum_over<V>(n, [&](V sum, int64_t at) {
      return fma(load<V>(weights + at, n - at), load<V>(grads + at, n - at), sum);
    }));
    for (int64_t at = 0; at < n; at += V::width) {
      const V grad = load<V>(grads + at, n - at) - mean;
      store(load<V>(weights + at, n - at) * grad, grads + at, n - at);
    }
  }
}

bool attend_grad(const AttendGradJob& job, int threads) {
  const Sampling& s = job.sampling;
  return dispatch(s.dtype, [&](auto x) {
    using T = decltype(x);
    using V = typename VecOf<T>::type;
    const auto count = [&](int64_t phase) {
      if (phase == 1) return s.batch * s.heads * s.num_levels;
      return phase == 0 || job.grad_logits ? softmax_tasks(s) : 0;
    };
    parallel_phases(3, threads, count, [&](int64_t phase, int64_t task, int thread) {
      if (phase == 0) softmax_task<V>(s, task);
      else if (phase == 1) attend_grad_task<V, T>(job, task, thread);
      else softmax_grad_task<V>(job, task);
    });
  });
}

} // namespace
