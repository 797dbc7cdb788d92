// The forward of deformable attention.
//
//   out[b, q, h] = sum over levels l and points n of  weight * bilinear(value_l[b, :, h], position), rounded once
//
// attend_kernel gathers the corners through the caches, from maps of any size. attend_resident_kernel is for maps of
// which one head fits the shared memory of a block, as those of a ViT do: a block loads 128 bytes of every pixel, level by
// level, and all queries of its slice gather from there, with their sums in registers. Modelled (MMFuser: 576 queries, 16
// heads of 64, 4 levels of 24 x 24, 4 points, bf16; measured on an H100: 13.5 us at B 16): 147,456 points x 4 corners x 128 bytes = 75 MB per
// image, which are 13 us from the L2 cache and 2.6 us from the shared memory of 132 multiprocessors; levels, offsets,
// logits and output are 7.7 MB, 1.8 us at 4.3 TB/s.
#include "deform_attn/cuda/points.cuh"

namespace igva::cuda {

constexpr int resident_lanes = 8; // that share a query: 8 vectors are 128 bytes, all banks of shared memory
constexpr int resident_passes = 6; // queries of a group, the sums of which stay in registers; 576 = 3 slices * 6 * 32

// Adds what a query and head read of a level. `reads` is whether the lane has channels.
template <int V, int G, class T, class Stride, class W>
__device__ inline void add_level(W (&sum)[V], const Sampling& s, int index, const Owner& own, int q,
                                 const Softmax<W>& softmax, const T* map, Stride stride, bool reads) {
  const Level& level = s.levels[index];
  const int lane = threadIdx.x % G, first_lane = threadIdx.x % 32 - lane;
  const int first = first_point(s, own.h) + level.first;
  const W* offsets = row_of<W>(s.offsets, own.b, q) + 2 * first;
  const W* logits = row_of<W>(s.logits, own.b, q) + first;
  for (int n = 0; n < level.points; n += G) {
    Point<W> mine = {};
    if (n + lane < level.points) {
      W steps[2];
      const Position<W> at = position_of(s, index, own.b, q, offsets + 2 * (n + lane), steps);
      mine = point_of(level, at, softmax.weight(logits[n + lane]));
    }
    const int count = min(G, level.points - n);
    for (int i = 0; i < count; ++i) {
      const Point<W> point = mine.from(first_lane + i);
      if (!reads) continue;
      if (point.right != point.right || point.weight != point.weight) {
#pragma unroll
        for (int c = 0; c < V; ++c) sum[c] = W(NAN);
      }
      const W up = point.weight * (1 - point.down), down = point.weight * point.down;
      const W weights[4] = {up * (1 - point.right), up * point.right, down * (1 - point.right), down * point.right};
      for_corners<V>(map, stride, level.width, point.place, [&](int corner, const Vector<T, V>& vector) {
        W value[V];
        widen<V>(vector, value);
#pragma unroll
        for (int c = 0; c < V; ++c) sum[c] += weights[corner] * value[c];
      });
    }
  }
}

template <class T>
__device__ inline T* out_of(const AttendParams& params, const Owner& own, int q) {
  const Sampling& s = params.sampling;
  const int64_t row = int64_t(own.b) * s.queries + q;
  return static_cast<T*>(params.out) + (row * s.heads + own.h) * s.width + own.channel;
}

template <class T, int V, int G>
__global__ void __launch_bounds__(block_threads, 3) attend_kernel(const __grid_constant__ AttendParams params) {
  using W = Wide<T>;
  const Sampling& s = params.sampling;
  const Owner own = owner_of<V>(s, params.split, blockIdx.x, s.queries);
  const int lane = threadIdx.x % G, place = threadIdx.x / G, q = own.first + min(place, own.count - 1);
  const bool reads = lane < own.vectors;
  const Softmax<W> softmax = softmax_of<G>(s, row_of<W>(s.logits, own.b, q) + first_point(s, own.h));
  W sum[V] = {};
  for (int l = 0; l < s.num_levels; ++l) {
    const T* map = head_of<const T>(s.levels[l], own.b, own.h) + own.channel + lane * V;
    add_level<V, G>(sum, s, l, own, q, softmax, map, s.levels[l].row_stride, reads);
  }
  if (reads && place < own.count) store<V>(out_of<T>(params, own, q) + lane * V, sum);
}

template <class T, int V>
__global__ void __launch_bounds__(block_threads, 2) attend_resident_kernel(const __grid_constant__ AttendParams params) {
  using W = Wide<T>;
  constexpr int G = resident_lanes, groups = block_threads / G;
  const Sampling& s = params.sampling;
  const Owner own = owner_of<V>(s, params.split, blockIdx.x, s.queries);
  const int lane = threadIdx.x % G, group = threadIdx.x / G;
  const bool reads = lane < own.vectors;
  T* map = static_cast<T*>(dynamic_shared());
  __shared__ Softmax<W> softmax[groups * resident_passes];

  // Groups without a query in the last pass repeat the slice's last one: shuffles need all lanes.
  const auto query = [&](int pass) { return own.first + min(pass * groups + group, own.count - 1); };
  for (int pass = 0; pass * groups < own.count; ++pass) {
    const W* logits = row_of<W>(s.logits, own.b, query(pass)) + first_point(s, own.h);
    const Softmax<W> found = softmax_of<G>(s, logits);
    if (lane == 0) softmax[pass * groups + group] = found;
  }
  W sums[resident_passes][V] = {};
  for (int l = 0; l < s.num_levels; ++l) {
    __syncthreads(); // until the level before this one has been read
    load_map<T, V, G>(s.levels[l], own, map);
    __syncthreads();
#pragma unroll
    for (int pass = 0; pass < resident_passes; ++pass) {
      if (pass * groups >= own.count) break;
      add_level<V, G>(sums[pass], s, l, own, query(pass), softmax[pass * groups + group], map + lane * V,
                      own.vectors * V, reads);
    }
  }
#pragma unroll
  for (int pass = 0; pass < resident_passes; ++pass) {
    const bool is_own = pass * groups + group < own.count;
    if (reads && is_own) store<V>(out_of<T>(params, own, query(pass)) + lane * V, sums[pass]);
  }
}

namespace {

template <class T, int V, int G>
int gather(AttendParams& params, Stream stream) {
  params.split = split_channels(params.sampling.width / V, G);
  split_into(params.split, params.sampling.queries, block_threads / G);
  return launch(attend_kernel<T, V, G>, blocks_of(params.sampling, params.split), block_threads, 0, stream, params);
}

} // namespace

int attend(AttendParams params, const Card& card, Stream stream) {
  const Sampling& s = params.sampling;
  return with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int V = vector_width<T>, G = resident_lanes, groups = block_threads / G;
    if (!s.vector) return gather<T, 1, 8>(params, stream);
    params.split = split_channels(s.width / V, G);
    const size_t shared = size_t(most_pixels(s)) * params.split.vectors * V * sizeof(T);
    if (!is_resident(s, shared + sizeof(Softmax<Wide<T>>) * groups * resident_passes, card)) {
      return s.width / V <= 4 ? gather<T, V, 4>(params, stream) : gather<T, V, 8>(params, stream);
    }
    split_queries(s, params.split, groups, resident_passes, card);
    return launch(attend_resident_kernel<T, V>, blocks_of(s, params.split), block_threads, shared, stream, params);
  });
}

} // namespace igva::cuda
