// The gradients of the positions and of the logits.
//
//   e = <grad[b, q, h], bilinear(value_l[b, :, h], position)>;  grad of the weight = e, of the position = weight * de
//   grad of a logit = weight * (e - sum over all points of weight * e) where the weights are a softmax
//
// A group of lanes owns a query and head: dot products are sums over its lanes in a fixed order. The corners are read as
// in attend.cu: through the caches, or from shared memory where all channels of a head and level fit.
#include "deform_attn/cuda/points.cuh"

namespace igva::cuda {

constexpr int grad_lanes = 8; // that share a query
constexpr int grad_passes = 18; // queries of a group, for which a level is loaded once; 576 = 18 * 32

template <class W>
struct PointGrad {
  W weight;
  W x;
  W y;
};

// <grad, ...> of the lane's channels, of all lanes of the group together.
template <int V, int G, class T, class Stride, class W>
__device__ inline PointGrad<W> dot(const T* grad, const T* map, Stride stride, int vectors, int width,
                                   const Point<W>& point) {
  W dots[4] = {};
  for (int v = threadIdx.x % G; v < vectors; v += G) {
    W of_out[V];
    load<V>(grad + v * V, of_out);
    for_corners<V>(map + v * V, stride, width, point.place, [&](int corner, const Vector<T, V>& vector) {
      W value[V];
      widen<V>(vector, value);
#pragma unroll
      for (int c = 0; c < V; ++c) dots[corner] += of_out[c] * value[c];
    });
  }
  const W x_above = dots[1] - dots[0], x_below = dots[3] - dots[2];
  const W above = (1 - point.right) * dots[0] + point.right * dots[1];
  const W below = (1 - point.right) * dots[2] + point.right * dots[3];
  return {group_sum<G>((1 - point.down) * above + point.down * below),
          point.weight * group_sum<G>((1 - point.down) * x_above + point.down * x_below),
          point.weight * group_sum<G>(below - above)};
}

// Writes the gradients of the points of a level, those of the logits without the softmax, and returns the lane's share
// of the sum of weight * e. `is_own` is whether the query is one of the group's.
template <int V, int G, class T, class Stride, class W>
__device__ inline W level_grads(const PlacesGradParams& params, int index, const Owner& own, int q,
                                const Softmax<W>& softmax, const T* map, Stride stride, bool is_own) {
  const Sampling& s = params.sampling;
  const Level& level = s.levels[index];
  const int lane = threadIdx.x % G, first_lane = threadIdx.x % 32 - lane;
  const int first = first_point(s, own.h) + level.first;
  const W* offsets = row_of<W>(s.offsets, own.b, q) + 2 * first;
  const W* logits = row_of<W>(s.logits, own.b, q) + first;
  const T* grad = row_of<T>(params.grad, own.b, q) + own.h * s.width;
  const int64_t out = (int64_t(own.b) * s.queries + q) * s.heads * s.num_points + first;
  W share = 0;
  for (int n = 0; n < level.points; n += G) {
    Point<W> mine = {};
    W steps[2] = {};
    const bool has_point = n + lane < level.points;
    if (has_point) {
      const Position<W> at = position_of(s, index, own.b, q, offsets + 2 * (n + lane), steps);
      mine = point_of(level, at, softmax.weight(logits[n + lane]));
    }
    PointGrad<W> kept = {};
    const int count = min(G, level.points - n);
    for (int i = 0; i < count; ++i) {
      const PointGrad<W> found =
          dot<V, G>(grad, map, stride, own.vectors, level.width, mine.from(first_lane + i));
      if (i == lane) kept = found;
    }
    if (!has_point || !is_own) continue;
    const int64_t at = out + n + lane;
    if (params.grad_offsets != nullptr) {
      W* to = static_cast<W*>(params.grad_offsets) + 2 * at;
      to[0] = params.in_pixels ? kept.x : kept.x * steps[0];
      to[1] = params.in_pixels ? kept.y : kept.y * steps[1];
    }
    if (params.grad_logits != nullptr) static_cast<W*>(params.grad_logits)[at] = kept.weight;
    share += mine.weight * kept.weight;
  }
  return share;
}

// The gradients of the logits from those of the weights.
template <int G, class W>
__device__ inline void finish_logits(const PlacesGradParams& params, const Owner& own, int q,
                                     const Softmax<W>& softmax, W total) {
  const Sampling& s = params.sampling;
  if (!s.softmax || params.grad_logits == nullptr) return;
  const W* logits = row_of<W>(s.logits, own.b, q) + first_point(s, own.h);
  const int64_t out = (int64_t(own.b) * s.queries + q) * s.heads * s.num_points + first_point(s, own.h);
  W* grads = static_cast<W*>(params.grad_logits) + out;
  for (int i = threadIdx.x % G; i < s.num_points; i += G) grads[i] = softmax.weight(logits[i]) * (grads[i] - total);
}

template <class T, int V, int G>
__global__ void __launch_bounds__(block_threads, 2) places_grad_kernel(const __grid_constant__ PlacesGradParams params) {
  using W = Wide<T>;
  const Sampling& s = params.sampling;
  const Owner own = owner_of<V>(s, params.split, blockIdx.x, s.queries);
  const int place = threadIdx.x / G, q = own.first + min(place, own.count - 1);
  const bool is_own = place < own.count;
  const Softmax<W> softmax = softmax_of<G>(s, row_of<W>(s.logits, own.b, q) + first_point(s, own.h));
  W share = 0;
  for (int l = 0; l < s.num_levels; ++l) {
    const T* map = head_of<const T>(s.levels[l], own.b, own.h);
    share += level_grads<V, G>(params, l, own, q, softmax, map, s.levels[l].row_stride, is_own);
  }
  const W total = group_sum<G>(share);
  __syncwarp(); // until the other lanes have written what this one reads
  if (is_own) finish_logits<G>(params, own, q, softmax, total);
}

template <class T, int V>
__global__ void __launch_bounds__(block_threads, 2)
    places_grad_resident_kernel(const __grid_constant__ PlacesGradParams params) {
  using W = Wide<T>;
  constexpr int G = grad_lanes, groups = block_threads / G;
  const Sampling& s = params.sampling;
  const Owner own = owner_of<V>(s, params.split, blockIdx.x, s.queries);
  const int lane = threadIdx.x % G, group = threadIdx.x / G;
  T* map = static_cast<T*>(dynamic_shared());
  __shared__ Softmax<W> softmax[groups * grad_passes];
  __shared__ W totals[groups * grad_passes];

  // Groups without a query in the last pass repeat the slice's last one: shuffles need all lanes.
  const auto query = [&](int place) { return own.first + min(place, own.count - 1); };
  for (int place = group; place - group < own.count; place += groups) {
    const W* logits = row_of<W>(s.logits, own.b, query(place)) + first_point(s, own.h);
    const Softmax<W> found = softmax_of<G>(s, logits);
    if (lane != 0) continue;
    softmax[place] = found;
    totals[place] = 0;
  }
  for (int l = 0; l < s.num_levels; ++l) {
    __syncthreads(); // until the level before this one has been read
    load_map<T, V, G>(s.levels[l], own, map);
    __syncthreads();
    for (int place = group; place - group < own.count; place += groups) {
      const W share = level_grads<V, G>(params, l, own, query(place), softmax[place], map, own.vectors * V,
                                        place < own.count);
      const W sum = group_sum<G>(share);
      if (lane == 0) totals[place] += sum;
    }
  }
  __syncthreads(); // what the lanes of a group have written is read by others of it
  for (int place = group; place < own.count; place += groups) {
    finish_logits<G>(params, own, query(place), softmax[place], totals[place]);
  }
}

namespace {

template <class T, int V, int G>
int gather(PlacesGradParams& params, Stream stream) {
  const Sampling& s = params.sampling;
  params.split = split_channels(s.width / V, s.width / V);
  split_into(params.split, s.queries, block_threads / G);
  return launch(places_grad_kernel<T, V, G>, blocks_of(s, params.split), block_threads, 0, stream, params);
}

} // namespace

int places_grad(PlacesGradParams params, const Card& card, Stream stream) {
  const Sampling& s = params.sampling;
  return with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    using W = Wide<T>;
    constexpr int V = vector_width<T>, groups = block_threads / grad_lanes;
    if (!s.vector) return gather<T, 1, 8>(params, stream);
    const size_t shared = size_t(most_pixels(s)) * s.width * sizeof(T);
    if (!is_resident(s, shared + (sizeof(Softmax<W>) + sizeof(W)) * groups * grad_passes, card)) {
      return s.width / V <= 4 ? gather<T, V, 4>(params, stream) : gather<T, V, 8>(params, stream);
    }
    params.split = split_channels(s.width / V, s.width / V);
    split_queries(s, params.split, groups, grad_passes, card);
    return launch(places_grad_resident_kernel<T, V>, blocks_of(s, params.split), block_threads, shared, stream, params);
  });
}

} // namespace igva::cuda
