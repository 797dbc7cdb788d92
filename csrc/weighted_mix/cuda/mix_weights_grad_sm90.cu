// The gradient of the mix weights from that of Z, on Hopper: the gradient of the mixed row is a tile in registers and
// is never stored.
//
//   dA = dZ * W1[:, block]
//   partials[m, tile, c] = sum over the entries (l, c, s) and the tile's d of  s * dA[m, d] * h_l[m, d]
//
// The caller adds the partials of a batch row: the same bits every time. W1[:, block] comes transposed, so that both
// operands are contiguous along the depth of the product, like those of gemm_sm90.cu.
//
// Thread t of a quad holds two columns of every eight. Each thread reads 16 bytes of a layer, eight columns, and the
// quad exchanges the words; while a tile is multiplied, the warp that copies asks for its layers to be brought to L2.
//
// Modelled (H200, IGVA on CLIP-L/336, not measured): products 6.1 us per image, 0.4 us more for the dots between two
// tiles. The two-kernel path reads the layers and dA after its product, 1.4 us per image. Transposing the weight takes
// 4 us per call.
#include "weighted_mix/cuda/gemm_sm90.h"

#include "gemm/hopper.cuh"

namespace igva::cuda {

namespace {

template <class T>
__device__ inline const T* layer_row(const Layer& layer, int64_t image, int patch) {
  return static_cast<const T*>(layer.data) + image * layer.image_stride + patch * layer.token_stride;
}

// A warp: one lane copies, and all of them ask for the rows of the layers that the tile will meet.
template <class T>
__device__ void copy_and_prefetch(const GradGemmParams& params, const Tiles& tiles, const Ring& ring, int lane) {
  const DotsParams& dots = params.dots;
  const int steps = (params.depth + gemm_tile_k - 1) / gemm_tile_k, requests = dots.num_dots * gemm_tile_m;
  Stage stage;
  for (int tile = tiles.first; tile < tiles.count(); tile += tiles.stride) {
    const int row = tiles.row(tile), column = tiles.column(tile);
    const uint32_t bytes = uint32_t(min(gemm_tile_n, dots.width - column) * sizeof(T));
    for (int step = 0; step < steps; ++step, stage.next()) {
      const int k = step * gemm_tile_k;
      if (lane == 0) ring.copy(stage, &params.grad_z, k, row, &params.weight, k, column, tiles.rank);
      __syncwarp();
      for (int i = step * 32 + lane; i < requests; i += steps * 32) {
        const int r = row + i % gemm_tile_m, b = r / dots.num_patches;
        const int64_t image = r < params.rows ? image_of(dots.image_index, b, dots.num_images) : -1;
        if (image < 0) continue;
        const Layer& layer = dots.layers[i / gemm_tile_m];
        ptx::prefetch_l2(layer_row<T>(layer, image, r - b * dots.num_patches) + column, bytes);
      }
    }
  }
}

// One warpgroup's 64 x 256 accumulators against the layers.
template <class T>
__device__ void dot_tile(const GradGemmParams& params, const float (&d)[128], int row, int column) {
  const DotsParams& dots = params.dots;
  const int thread = threadIdx.x % 128, lane = thread % 32, quad = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + thread / 32 * 16 + lane / 4 + 8 * h, b = r / dots.num_patches;
    const int64_t image = r < params.rows ? image_of(dots.image_index, b, dots.num_images) : -1;
    double* partials = dots.partials + (int64_t(r) * params.slots + column / gemm_tile_n) * dots.num_columns;
    float sum = 0;
    for (int e = 0; e < dots.num_dots; ++e) {
      const T* from = layer_row<T>(dots.layers[e], image, r - b * dots.num_patches);
      float product = 0;
#pragma unroll
      for (int j = 0; j < 32; j += 4) {
        const int n = column + (j + quad) * 8;
        Vector<uint32_t, 4> words = {};
        if (image >= 0 && n < dots.width) words = *reinterpret_cast<const Vector<uint32_t, 4>*>(from + n);
        transpose_quad(words.element, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float value[2];
          widen<2>(reinterpret_cast<const Vector<T, 2>&>(words.element[i]), value);
          product += d[(j + i) * 4 + 2 * h] * value[0];
          product += d[(j + i) * 4 + 2 * h + 1] * value[1];
        }
      }
      sum += float(dots.dots[e].scale) * product;
      if (e + 1 < dots.num_dots && dots.dots[e + 1].column == dots.dots[e].column) continue;
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (quad == 0 && r < params.rows) partials[dots.dots[e].column] = image < 0 ? NAN : double(sum);
      sum = 0;
    }
  }
}

} // namespace

template <class T>
__global__ void __launch_bounds__(threads, 1)
    mix_weights_grad_sm90_kernel(const __grid_constant__ GradGemmParams params) {
  const Ring ring = {static_cast<unsigned char*>(dynamic_shared())};
  const Tiles tiles(params.rows, params.dots.width, params.grid);
  run_warpgroups(
      ring,
      [&] {
        multiply<T>(tiles, ring, (params.depth + gemm_tile_k - 1) / gemm_tile_k,
                    [&](const float(&d)[128], int row, int column) { dot_tile<T>(params, d, row, column); });
      },
      [&](int thread) {
        if (thread < 32) copy_and_prefetch<T>(params, tiles, ring, thread);
      });
}

int mix_weights_grad_sm90(const GradGemmParams& params, DType dtype, Stream stream) {
  const auto kernel =
      dtype == DType::bf16 ? mix_weights_grad_sm90_kernel<__nv_bfloat16> : mix_weights_grad_sm90_kernel<__half>;
  return launch_clusters(kernel, gemm_cluster, dim3(params.grid), threads, shared_bytes, stream, params);
}

} // namespace igva::cuda
