// The one-pass mix: every thread owns one vector of a row and walks the plan once.
//
//   A[b, p, g*D + d] = sum over the terms of block g of  s * w[b, c] * sum over l of h_l[image(b), skip + p, d]
//
// Floor (CLIP-L/336, IGVA, bf16, 4.3 TB/s): 24 layers read, 2 blocks written = 26 * 1.18 MB per image = 7.1 us; measured
// on an H200: 7.6 us at B 64. A layer that stands in two blocks is read twice; the second time it comes from a cache.
#include "weighted_mix/cuda/mix_vector.cuh"

namespace igva::cuda {

template <class T, int V>
__global__ void __launch_bounds__(block_threads, 3) mix_kernel(const __grid_constant__ MixParams params) {
  const Place at = place(blockIdx.x, threadIdx.x, params.width / V);
  if (at.row >= params.num_rows) return;
  const int row = int(at.row), b = row / params.num_patches, patch = row - b * params.num_patches, d = at.vector * V;
  mix_vector<T, V>(params, b, patch, d, [&](int g, const Wide<T>(&values)[V]) {
    if (params.rows == nullptr) return;
    store<V>(params.rows, params.out, (at.row * params.num_blocks + g) * params.width + d, values);
  });
}

int mix(const MixParams& params, DType layers, bool vector, Stream stream) {
  return with_type(layers, [&](auto type) {
    using T = decltype(type);
    constexpr int V = vector_width<T>;
    const dim3 grid(blocks_for(int64_t(params.num_rows) * (vector ? params.width / V : params.width)));
    return launch(vector ? mix_kernel<T, V> : mix_kernel<T, 1>, grid, block_threads, 0, stream, params);
  });
}

} // namespace igva::cuda
