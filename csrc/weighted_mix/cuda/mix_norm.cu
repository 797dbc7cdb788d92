// The one-pass mix with LayerNorm over the mixed row: one block per row, the unrounded row in shared memory.
//
//   A' = (A - mean) * rstd * weight + bias,  statistics from the unrounded A in two passes over shared memory
//
// Modelled floor: that of the mix; the row never leaves the multiprocessor before it is normalised. Each thread reads
// back only what it wrote, so the barriers are those of the two sums.
#include "weighted_mix/cuda/mix_vector.cuh"

namespace igva::cuda {

template <class T, int V>
__global__ void __launch_bounds__(block_threads, 3)
    mix_norm_kernel(const __grid_constant__ MixParams params, const __grid_constant__ Norm norm) {
  using W = Wide<T>;
  __shared__ W scratch[block_threads / 32];
  W* row_values = static_cast<W*>(dynamic_shared());
  const int row = blockIdx.x, b = row / params.num_patches, patch = row - b * params.num_patches;
  const int row_width = params.num_blocks * params.width, vectors = params.width / V;
  const int64_t first = int64_t(row) * row_width;

  W sum = 0;
  for (int vector = threadIdx.x; vector < vectors; vector += block_threads) {
    mix_vector<T, V>(params, b, patch, vector * V, [&](int g, const W(&values)[V]) {
      const int at = g * params.width + vector * V;
      store<V>(row_values + at, values);
#pragma unroll
      for (int i = 0; i < V; ++i) sum += values[i];
      if (params.raw_rows != nullptr) store<V>(params.raw_rows, params.out, first + at, values);
    });
  }
  const W mean = block_sum(sum, scratch) / row_width;
  W squares = 0;
  for (int vector = threadIdx.x; vector < vectors; vector += block_threads) {
    for (int g = 0; g < params.num_blocks; ++g) {
      W values[V];
      load<V>(row_values + g * params.width + vector * V, values);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const W centred = values[i] - mean;
        squares += centred * centred;
      }
    }
  }
  const W rstd = rsqrt(block_sum(squares, scratch) / row_width + W(norm.eps));
  if (threadIdx.x == 0) {
    static_cast<W*>(norm.mean)[row] = mean;
    static_cast<W*>(norm.rstd)[row] = rstd;
  }
  for (int vector = threadIdx.x; vector < vectors; vector += block_threads) {
    for (int g = 0; g < params.num_blocks; ++g) {
      const int at = g * params.width + vector * V;
      W values[V], parameter[V];
      load<V>(row_values + at, values);
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = (values[i] - mean) * rstd;
      if (norm.weight.data != nullptr) {
        load<V>(norm.weight.data, norm.weight.dtype, at, parameter);
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] *= parameter[i];
      }
      if (norm.bias.data != nullptr) {
        load<V>(norm.bias.data, norm.bias.dtype, at, parameter);
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] += parameter[i];
      }
      store<V>(params.rows, params.out, first + at, values);
    }
  }
}

int mix_norm(const MixParams& params, const Norm& norm, DType layers, bool vector, Stream stream) {
  return with_type(layers, [&](auto type) {
    using T = decltype(type);
    const size_t shared = sizeof(Wide<T>) * params.num_blocks * params.width;
    return launch(vector ? mix_norm_kernel<T, vector_width<T>> : mix_norm_kernel<T, 1>, dim3(params.num_rows),
                  block_threads, shared, stream, params, norm);
  });
}

} // namespace igva::cuda
