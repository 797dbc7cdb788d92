// The gradient of the mix weights from that of the mixed row, without an atomic: the same bits every time.
//
//   dw[b, c] = sum over p, d and the entries (l, c, s) of  s * dA[b, p, g*D + d] * h_l[image(b), p, d]
//
// A block sums one chunk of patches of one batch row for all entries (fp32 products, one fp64 partial per entry); a
// second kernel adds the partials of a column in order. Modelled floor (IGVA over its reduced sources): 5 * 1.18 MB
// read per image.
#include "cuda/common.cuh"
#include "weighted_mix/cuda/params.h"

namespace igva::cuda {

constexpr int dots_at_once = 4; // accumulators in registers

template <class G, class T, int V>
__global__ void __launch_bounds__(block_threads) dots_kernel(const __grid_constant__ DotsParams params) {
  using W = Wide<T>;
  __shared__ W scratch[block_threads / 32];
  const int chunks = (params.num_patches + params.chunk - 1) / params.chunk;
  const int b = blockIdx.x / chunks, first = (blockIdx.x - b * chunks) * params.chunk;
  const int patches = min(params.chunk, params.num_patches - first), vectors = params.width / V;
  const int64_t image = image_of(params.image_index, b, params.num_images);
  const G* grad = static_cast<const G*>(params.grad.data) + b * params.grad.batch_stride;
  double* partials = params.partials + int64_t(blockIdx.x) * params.num_dots;

  for (int begin = 0; begin < params.num_dots; begin += dots_at_once) {
    W sums[dots_at_once] = {};
    for (int i = threadIdx.x; image >= 0 && i < patches * vectors; i += block_threads) {
      const int64_t patch = first + i / vectors;
      const int d = i % vectors * V;
#pragma unroll
      for (int e = 0; e < dots_at_once; ++e) {
        if (begin + e >= params.num_dots) break;
        const Dot& dot = params.dots[begin + e];
        const Layer& layer = params.layers[begin + e];
        W gradient[V], value[V]; // entries of one block share a gradient, which the first one brings to the cache
        load<V>(grad + patch * params.grad.token_stride + int64_t(dot.block) * params.width + d, gradient);
        load<V>(static_cast<const T*>(layer.data) + image * layer.image_stride + patch * layer.token_stride + d, value);
#pragma unroll
        for (int j = 0; j < V; ++j) sums[e] += gradient[j] * value[j];
      }
    }
#pragma unroll
    for (int e = 0; e < dots_at_once; ++e) {
      const W sum = block_sum(sums[e], scratch);
      if (threadIdx.x == 0 && begin + e < params.num_dots) partials[begin + e] = image < 0 ? NAN : double(sum);
    }
  }
}

// One thread per (b, column).
template <class W>
__global__ void __launch_bounds__(block_threads) column_sums_kernel(const __grid_constant__ DotsParams params) {
  const int64_t at = int64_t(blockIdx.x) * block_threads + threadIdx.x, b = at / params.num_columns;
  if (b >= params.batch) return;
  const int column = int(at - b * params.num_columns);
  const int chunks = (params.num_patches + params.chunk - 1) / params.chunk;
  double total = 0;
  for (int e = 0; e < params.num_dots; ++e) {
    if (params.dots[e].column != column) continue;
    double sum = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      sum += params.partials[(b * chunks + chunk) * params.num_dots + e];
    }
    total += params.dots[e].scale * sum;
  }
  static_cast<W*>(params.grad_weights)[at] = W(total);
}

int mix_weights_grad(const DotsParams& params, DType layers, bool vector, Stream stream) {
  const dim3 grid(params.batch * ((params.num_patches + params.chunk - 1) / params.chunk));
  return with_type(layers, [&](auto layer) {
    using T = decltype(layer);
    const int error = with_type(params.grad.dtype, [&](auto gradient) -> int {
      using G = decltype(gradient);
      // A vector is 16 bytes of the narrower type; the same elements of the wider one are loaded in 16-byte pieces.
      constexpr int V = vector_width<T> > vector_width<G> ? vector_width<T> : vector_width<G>;
      if constexpr (std::is_same_v<Wide<G>, Wide<T>>) {
        return launch(vector ? dots_kernel<G, T, V> : dots_kernel<G, T, 1>, grid, block_threads, 0, stream, params);
      }
      return cudaErrorInvalidValue;
    });
    if (error != cudaSuccess) return error;
    return launch(column_sums_kernel<Wide<T>>, dim3(blocks_for(int64_t(params.batch) * params.num_columns)),
                  block_threads, 0, stream, params);
  });
}

} // namespace igva::cuda
