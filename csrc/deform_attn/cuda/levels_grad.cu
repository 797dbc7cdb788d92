// The gradients of the levels, without an atomic on their elements.
//
//   grad of a pixel = sum over the points of the four cells of which it is a corner of  weight * corner's share * grad[q]
//
// The points of a level are put in the order of their cells, stably; then every pixel gathers its four cells, which are
// two runs of points. Every sum has one owner and a fixed order, and nothing is rounded but at its end.
//
// levels_grad_resident_kernel sorts the points of a head and level in shared memory and has 128 bytes of every row of the
// gradient of the output there as well. Modelled (MMFuser's shape, see attend.cu; docs/gpu.md has measured all gradients together): 9,216 reads of a row per
// head and level, of 8 lanes each, which take 24,000 cycles of a multiprocessor to issue: 6.6 us per image on 132.
// Where that does not fit, points_kernel writes the points and the numbers of their cells to memory, torch sorts these,
// and sorted_grad_kernel gathers.
#include "deform_attn/cuda/points.cuh"

namespace igva::cuda {

constexpr int lanes = 8; // that share a pixel
constexpr int owner_threads = 512; // of a block that sorts: it has a multiprocessor for itself
constexpr int sorters = 4; // warps that sort, each a piece of the points

// The cell of a position among those of its level, -1 where no corner is inside.
template <class W>
__device__ inline int cell_of(const Level& level, const Position<W>& at) {
  return at.is_inside ? (at.y + 1) * (level.width + 1) + at.x + 1 : -1;
}

// Adds to a pixel what is due to the points of its four cells. starts(c) is the place of the first point of cell c in
// the order, entry(i) the point at a place, row(q) the lane's channels of the gradient of query q.
template <int V, class W, class Starts, class GetEntry, class Row>
__device__ inline void add_cells(W (&sum)[V], int x, int y, int width, Starts starts, GetEntry entry, Row row) {
#pragma unroll
  for (int below = 0; below < 2; ++below) { // the cells below the pixel come later in the order than those above
    const int left = (y + below) * (width + 1) + x; // cell (x - 1, y - 1 + below)
    const int middle = starts(left + 1), end = starts(left + 2);
    for (int i = starts(left); i < end; ++i) {
      const Entry<W> point = entry(i);
      const W along_x = i < middle ? point.right : 1 - point.right, along_y = below ? 1 - point.down : point.down;
      const W weight = point.weight * along_y * along_x;
      W grad[V];
      load<V>(row(point.query), grad);
#pragma unroll
      for (int c = 0; c < V; ++c) sum[c] += weight * grad[c];
    }
  }
}

// ---- in shared memory ------------------------------------------------------------------------------------------------

// Where the parts of a block's shared memory begin, in bytes.
struct Layout {
  size_t sorted;
  size_t softmax;
  size_t starts;
  size_t counts;
  size_t end;
};

// The first part has the points as they come and, once they are sorted, the rows of the gradient.
template <class T>
inline __host__ __device__ Layout layout_of(int queries, int row_bytes, int points, int cells) {
  using W = Wide<T>;
  const size_t entries = sizeof(Entry<W>) * points, rows = size_t(queries) * row_bytes;
  Layout at;
  at.sorted = entries < rows ? rows : entries;
  at.softmax = at.sorted + entries;
  at.starts = at.softmax + sizeof(Softmax<W>) * queries;
  at.counts = at.starts + sizeof(int) * (cells + 1);
  at.end = at.counts + sizeof(int) * cells * sorters;
  return at;
}

// Turns the sorters' counts per cell into where each puts its next point, and writes where the cells start. By one warp.
__device__ inline void find_starts(int* starts, int* counts, int cells) {
  const int lane = threadIdx.x;
  int before = 0;
  for (int first = 0; first < cells; first += 32) {
    const int cell = first + lane;
    int total = 0;
    if (cell < cells) {
      for (int w = 0; w < sorters; ++w) total += counts[w * cells + cell];
    }
    int end = total;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_sync(all_lanes, end, (lane - distance) & 31);
      if (lane >= distance) end += other;
    }
    int start = before + end - total;
    before += __shfl_sync(all_lanes, end, 31);
    if (cell >= cells) continue;
    starts[cell] = start;
    for (int w = 0; w < sorters; ++w) {
      const int count = counts[w * cells + cell];
      counts[w * cells + cell] = start;
      start += count;
    }
  }
  if (lane == 0) starts[cells] = before;
}

// Puts the points from `first` to `end` in the order of their cells, 32 at a time. By one warp.
template <class W>
__device__ inline void sort(const Entry<W>* points, int first, int end, int per_query, int* next, Entry<W>* sorted) {
  const int lane = threadIdx.x % 32;
  for (; first < end; first += 32) {
    const int i = first + lane;
    Entry<W> point = {0, 0, 0, -1};
    if (i < end) point = points[i];
    const int cell = point.query; // until now
    const unsigned same = __match_any_sync(all_lanes, cell);
    const int rank = __popc(same & ((1u << lane) - 1));
    point.query = i / per_query;
    if (cell >= 0) sorted[next[cell] + rank] = point;
    __syncwarp();
    if (cell >= 0 && rank == 0) next[cell] += __popc(same);
    __syncwarp();
  }
}

template <class T, int V>
__global__ void __launch_bounds__(owner_threads, 1)
    levels_grad_resident_kernel(const __grid_constant__ LevelsGradParams params) {
  using W = Wide<T>;
  const Sampling& s = params.sampling;
  const Owner own = owner_of<V>(s, params.split, blockIdx.x, s.queries);
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, warp = threadIdx.x / 32;
  constexpr int groups = owner_threads / lanes;
  const int stride = params.split.vectors * V, channel = own.channel + lane * V;
  const bool has_channels = lane < own.vectors;
  const int first_level = int(blockIdx.y) * params.levels_per_block;
  const int end_level = min(first_level + params.levels_per_block, s.num_levels);

  int most_points = 0, most_cells = 0;
  for (int l = 0; l < s.num_levels; ++l) {
    most_points = max(most_points, s.levels[l].points * s.queries);
    most_cells = max(most_cells, cells_of(s.levels[l]));
  }
  const Layout at = layout_of<T>(s.queries, stride * int(sizeof(T)), most_points, most_cells);
  auto* shared = static_cast<unsigned char*>(dynamic_shared());
  auto* points = reinterpret_cast<Entry<W>*>(shared);
  T* rows = reinterpret_cast<T*>(shared);
  auto* sorted = reinterpret_cast<Entry<W>*>(shared + at.sorted);
  auto* softmax = reinterpret_cast<Softmax<W>*>(shared + at.softmax);
  int* starts = reinterpret_cast<int*>(shared + at.starts);
  int* counts = reinterpret_cast<int*>(shared + at.counts);

  for (int place = group; place - group < s.queries; place += groups) {
    const int q = min(place, s.queries - 1);
    const Softmax<W> found = softmax_of<lanes>(s, row_of<W>(s.logits, own.b, q) + first_point(s, own.h));
    if (lane == 0 && place < s.queries) softmax[q] = found;
  }
  for (int l = first_level; l < end_level; ++l) {
    const Level& level = s.levels[l];
    const int cells = cells_of(level), num_points = s.queries * level.points;
    const int first = first_point(s, own.h) + level.first;
    __syncthreads(); // until the level before this one is done
    for (int i = threadIdx.x; i < cells * sorters; i += owner_threads) counts[i] = 0;
    for (int i = threadIdx.x; i < num_points; i += owner_threads) {
      const int q = i / level.points, n = first + i - q * level.points;
      W steps[2];
      const Position<W> place = position_of(s, l, own.b, q, row_of<W>(s.offsets, own.b, q) + 2 * n, steps);
      points[i] = {place.right, place.down, softmax[q].weight(row_of<W>(s.logits, own.b, q)[n]), cell_of(level, place)};
    }
    __syncthreads();
    const int piece = chunks(num_points, sorters), piece_end = min((warp + 1) * piece, num_points);
    if (warp < sorters) {
      for (int i = warp * piece + threadIdx.x % 32; i < piece_end; i += 32) {
        if (points[i].query >= 0) atomicAdd(&counts[warp * cells + points[i].query], 1);
      }
    }
    __syncthreads();
    if (warp == 0) find_starts(starts, counts, cells);
    __syncthreads();
    if (warp < sorters) sort(points, warp * piece, piece_end, level.points, counts + warp * cells, sorted);
    __syncthreads();
    if (has_channels) {
      for (int q = group; q < s.queries; q += groups) {
        copy_async(reinterpret_cast<Vector<T, V>*>(rows + q * stride + lane * V),
                   reinterpret_cast<const Vector<T, V>*>(row_of<T>(params.grad, own.b, q) + own.h * s.width + channel));
      }
    }
    wait_for_copies();
    __syncthreads();
    if (!has_channels) continue;
    T* out = head_of<T>(level, own.b, own.h) + channel;
    for (int pixel = group; pixel < pixels_of(level); pixel += groups) {
      const int y = pixel / level.width, x = pixel - y * level.width;
      W sum[V] = {};
      add_cells(
          sum, x, y, level.width, [&](int cell) { return starts[cell]; }, [&](int i) { return sorted[i]; },
          [&](int q) { return rows + q * stride + lane * V; });
      store<V>(out + pixel * level.row_stride, sum);
    }
  }
}

int levels_grad(LevelsGradParams params, const Card& card, bool& fits, Stream stream) {
  const Sampling& s = params.sampling;
  fits = false;
  if (!s.vector) return 0;
  int most_points = 0, most_cells = 0;
  for (int l = 0; l < s.num_levels; ++l) {
    if (int64_t(s.levels[l].points) * s.queries > INT32_MAX) return 0;
    most_points = max(most_points, s.levels[l].points * s.queries);
    most_cells = max(most_cells, cells_of(s.levels[l]));
  }
  return with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int V = vector_width<T>;
    for (int most = lanes; !fits && most > 1; most /= 2) { // narrower parts sort more often
      params.split = split_channels(s.width / V, most);
      const int row_bytes = params.split.vectors * V * int(sizeof(T));
      const size_t shared = layout_of<T>(s.queries, row_bytes, most_points, most_cells).end;
      if (shared > card.shared) continue;
      fits = true;
      split_into(params.split, s.queries, s.queries);
      dim3 grid = blocks_of(s, params.split);
      const int pieces = min(s.num_levels, chunks(2 * card.multiprocessors, grid.x));
      params.levels_per_block = chunks(s.num_levels, pieces);
      grid.y = chunks(s.num_levels, params.levels_per_block);
      return launch(levels_grad_resident_kernel<T, V>, grid, owner_threads, shared, stream, params);
    }
    return 0;
  });
}

// ---- through memory --------------------------------------------------------------------------------------------------

template <class W>
__global__ void __launch_bounds__(block_threads) points_kernel(const __grid_constant__ PointsParams params) {
  const Sampling& s = params.sampling;
  const int lane = threadIdx.x % lanes;
  const int64_t count = int64_t(s.batch) * s.queries * s.heads;
  const int64_t place = (int64_t(blockIdx.x) * block_threads + threadIdx.x) / lanes, at = min(place, count - 1);
  const int h = int(at % s.heads), q = int(at / s.heads % s.queries), b = int(at / s.heads / s.queries);
  const W* offsets = row_of<W>(s.offsets, b, q) + 2 * first_point(s, h);
  const W* logits = row_of<W>(s.logits, b, q) + first_point(s, h);
  const Softmax<W> softmax = softmax_of<lanes>(s, logits);
  if (place >= count) return;
  int first_cell = 0;
  for (int l = 0; l < s.num_levels; ++l) first_cell += cells_of(s.levels[l]);
  first_cell *= b * s.heads + h;
  for (int l = 0; l < s.num_levels; ++l) {
    const Level& level = s.levels[l];
    for (int n = level.first + lane; n < level.first + level.points; n += lanes) {
      W steps[2];
      const Position<W> position = position_of(s, l, b, q, offsets + 2 * n, steps);
      const int cell = cell_of(level, position);
      params.cells[at * s.num_points + n] = cell < 0 ? INT32_MAX : first_cell + cell;
      static_cast<Entry<W>*>(params.entries)[at * s.num_points + n] = {position.right, position.down,
                                                                       softmax.weight(logits[n]), q};
    }
    first_cell += cells_of(level);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(block_threads) sorted_grad_kernel(const __grid_constant__ SortedGradParams params) {
  using W = Wide<T>;
  const Sampling& s = params.sampling;
  const Level& level = s.levels[blockIdx.y];
  const Owner own = owner_of<V>(s, params.split, blockIdx.x, pixels_of(level));
  const int lane = threadIdx.x % lanes, pixel = own.first + int(threadIdx.x) / lanes;
  if (lane >= own.vectors || pixel >= pixels_of(level)) return;
  int first_cell = 0, all_cells = 0;
  for (int l = 0; l < s.num_levels; ++l) {
    if (l == int(blockIdx.y)) first_cell = all_cells;
    all_cells += cells_of(s.levels[l]);
  }
  const int* starts = params.starts + (own.b * s.heads + own.h) * all_cells + first_cell;
  const int channel = own.channel + lane * V, y = pixel / level.width, x = pixel - y * level.width;
  W sum[V] = {};
  add_cells(
      sum, x, y, level.width, [&](int cell) { return starts[cell]; },
      [&](int i) { return static_cast<const Entry<W>*>(params.entries)[params.order[i]]; },
      [&](int q) { return row_of<T>(params.grad, own.b, q) + own.h * s.width + channel; });
  store<V>(head_of<T>(level, own.b, own.h) + channel + pixel * level.row_stride, sum);
}

int points(const PointsParams& params, Stream stream) {
  const Sampling& s = params.sampling;
  const dim3 grid(blocks_for(int64_t(s.batch) * s.queries * s.heads * lanes));
  auto* kernel = s.dtype == DType::f64 ? points_kernel<double> : points_kernel<float>;
  return launch(kernel, grid, block_threads, 0, stream, params);
}

int sorted_grad(SortedGradParams params, Stream stream) {
  const Sampling& s = params.sampling;
  return with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int V = vector_width<T>;
    params.split = split_channels(s.vector ? s.width / V : s.width, lanes);
    split_into(params.split, most_pixels(s), block_threads / lanes);
    dim3 grid = blocks_of(s, params.split);
    grid.y = s.num_levels;
    return launch(s.vector ? sorted_grad_kernel<T, V> : sorted_grad_kernel<T, 1>, grid, block_threads, 0, stream, params);
  });
}

} // namespace igva::cuda
