// The gradient of LayerNorm over whole rows: one block per row, and column sums over chunks of rows for its parameters.
//
//   g = dA' * weight, n = (A - mean) * rstd:   dA = rstd * (g - mean(g) - n * mean(g * n))
//   dweight = sum over rows of dA' * n,  dbias = sum over rows of dA'   (fixed chunks, added by the caller in order)
//
// Modelled floor: 2 reads and 1 write of [M, G*D]; the second pass over a row reads it from a cache. If parameters are
// trained, the column sums read both matrices once more from memory.
#include "cuda/common.cuh"
#include "dense/cuda/params.h"

namespace igva::cuda {

template <class T, int V>
__global__ void __launch_bounds__(block_threads) norm_grad_kernel(const __grid_constant__ NormGradParams params) {
  using W = Wide<T>;
  __shared__ W scratch[block_threads / 32];
  const int64_t first = int64_t(blockIdx.x) * params.width;
  const T* grad = static_cast<const T*>(params.grad) + first;
  const T* rows = static_cast<const T*>(params.rows) + first;
  const W mean = static_cast<const W*>(params.norm.mean)[blockIdx.x], rstd = static_cast<const W*>(params.norm.rstd)[blockIdx.x];

  const auto each_vector = [&](auto use) {
    for (int at = threadIdx.x * V; at < params.width; at += block_threads * V) {
      W g[V], n[V];
      load<V>(grad + at, g);
      load<V>(rows + at, n);
#pragma unroll
      for (int i = 0; i < V; ++i) n[i] = (n[i] - mean) * rstd;
      if (params.norm.weight.data != nullptr) {
        W weight[V];
        load<V>(params.norm.weight.data, params.norm.weight.dtype, at, weight);
#pragma unroll
        for (int i = 0; i < V; ++i) g[i] *= weight[i];
      }
      use(at, g, n);
    }
  };
  W sum = 0, projection = 0;
  each_vector([&](int, const W(&g)[V], const W(&n)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sum += g[i];
      projection += g[i] * n[i];
    }
  });
  const W mean_g = block_sum(sum, scratch) / params.width;
  const W mean_gn = block_sum(projection, scratch) / params.width;
  each_vector([&](int at, W(&g)[V], const W(&n)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) g[i] = rstd * (g[i] - mean_g - n[i] * mean_gn);
    store<V>(static_cast<T*>(params.grad_rows) + first + at, g);
  });
}

// One thread per column; blockIdx.x is the chunk, since there may be more than the 65535 that blockIdx.y allows.
template <class T>
__global__ void __launch_bounds__(block_threads) norm_param_grads_kernel(const __grid_constant__ NormGradParams params) {
  using W = Wide<T>;
  const int column = blockIdx.y * block_threads + threadIdx.x;
  if (column >= params.width) return;
  const int64_t begin = int64_t(blockIdx.x) * params.chunk;
  const int64_t end = begin + params.chunk < params.num_rows ? begin + params.chunk : params.num_rows;
  W weight = 0, bias = 0;
  for (int64_t row = begin; row < end; ++row) {
    const W grad = widen<W>(static_cast<const T*>(params.grad)[row * params.width + column]);
    const W value = widen<W>(static_cast<const T*>(params.rows)[row * params.width + column]);
    weight += grad * ((value - static_cast<const W*>(params.norm.mean)[row]) * static_cast<const W*>(params.norm.rstd)[row]);
    bias += grad;
  }
  W* partials = static_cast<W*>(params.partials) + int64_t(blockIdx.x) * 2 * params.width;
  partials[column] = weight;
  partials[params.width + column] = bias;
}

int norm_grad(const NormGradParams& params, DType dtype, bool vector, Stream stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int error = launch(vector ? norm_grad_kernel<T, vector_width<T>> : norm_grad_kernel<T, 1>,
                             dim3(unsigned(params.num_rows)), block_threads, 0, stream, params);
    if (error != cudaSuccess || params.partials == nullptr) return error;
    const dim3 grid(unsigned((params.num_rows + params.chunk - 1) / params.chunk), blocks_for(params.width));
    return launch(norm_param_grads_kernel<T>, grid, block_threads, 0, stream, params);
  });
}

} // namespace igva::cuda
