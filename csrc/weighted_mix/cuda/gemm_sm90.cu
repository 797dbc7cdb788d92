// The first Linear with the mix hidden behind it, on Hopper: one persistent kernel mixes and multiplies at once.
//
//   Y[out(r), n] = act(sum over k of A[r, k] * W[n, k] + bias[n]),   Z the same before act, if asked for
//
// Rows r = b * T + t are flat, skipped tokens included (0.17 % waste for a CLS token), so that a block of A that is a
// tap is read by the copy engine where the layer lies; out(r) drops the skipped tokens in the store. Mixed blocks are
// written to a scratch F [rows, blocks * D] ahead of the products that read them, by the three warps per multiprocessor
// that neither copy nor multiply: 8 rows at a time, claimed from a ticket in the order of the rows. Taps are multiplied
// first, since they need no mix.
//
// Every tile of 128 rows of F has a flag that counts its mixed groups of 8 rows. The copy warp waits for it before the
// first box of F. Mixers never wait, and only a running mixer claims a group, so no launch depends on how many blocks
// are resident. F is written by ordinary stores and read by the copy engine: a proxy fence stands on both sides of the
// flag. Ticket and flags are zero at launch; the caller clears them on the same stream, which a graph captures.
//
// Modelled (H200, 790 TFLOP/s, 4.3 TB/s, CLIP-L/336 and IGVA; not measured): products 12.2 us per image, the mix 7.1 us
// beside them. Without mixed blocks (a concat of taps) the mixers leave at once.
#include "weighted_mix/cuda/gemm_sm90.h"

#include "dense/cuda/activation.cuh"
#include "gemm/hopper.cuh"
#include "weighted_mix/cuda/mix_vector.cuh"

namespace igva::cuda {

namespace {

// One thread: boxes of A and of its half of W for every tile and step of K, the steps of F last.
__device__ void copy_boxes(const GemmParams& params, const Tiles& tiles, const Ring& ring) {
  const int steps_a_block = params.width / gemm_tile_k;
  Stage stage;
  for (int tile = tiles.first; tile < tiles.count(); tile += tiles.stride) {
    const int row = tiles.row(tile), column = tiles.column(tile);
    bool waited = false;
    for (int i = 0; i < params.num_blocks; ++i) {
      const GemmBlock& block = params.blocks[i];
      if (block.mixed && !waited) {
        const int groups = gemm_tile_m / gemm_mix_rows;
        while (ptx::load_acquire(params.flags + 1 + row / gemm_tile_m) < groups) {}
        ptx::proxy_fence();
        waited = true;
      }
      for (int step = 0; step < steps_a_block; ++step, stage.next()) {
        ring.copy(stage, &params.a[block.map], block.offset + step * gemm_tile_k, row, &params.w,
                  block.position * params.width + step * gemm_tile_k, column, tiles.rank);
      }
    }
  }
}

// A warp: groups of rows in order, each mixed 32 vectors at a time while the next ones come to L2.
template <class T>
__device__ void mix_rows(const GemmParams& params, const Tiles& tiles, int lane) {
  constexpr int V = vector_width<T>, segment = 32 * V; // elements that a warp mixes at a time
  constexpr int ahead = 2;                             // segments by which the prefetch is ahead
  const int groups = tiles.down * gemm_cluster * (gemm_tile_m / gemm_mix_rows);
  const int segments = (params.width + segment - 1) / segment; // of a row
  for (;;) {
    int group = 0;
    if (lane == 0) group = atomicAdd(params.flags, 1);
    group = __shfl_sync(0xffffffffu, group, 0);
    if (group >= groups) return;
    const int first = group * gemm_mix_rows;

    const auto request = [&](int s) {
      const int r = first + s / segments, d = s % segments * segment;
      if (s >= segments * gemm_mix_rows || r >= params.rows) return;
      const int b = r / params.tokens, patch = r - b * params.tokens - params.skip;
      if (patch < 0) return;
      for (int l = lane; l < params.num_mix_layers; l += 32) {
        const Layer& layer = params.mix.layers[l];
        const T* from = static_cast<const T*>(layer.data) + b * layer.image_stride + patch * layer.token_stride + d;
        ptx::prefetch_l2(from, uint32_t(min(segment, params.width - d) * sizeof(T)));
      }
    };
    for (int s = 0; s < ahead; ++s) request(s);
    for (int s = 0; s < segments * gemm_mix_rows; ++s) {
      request(s + ahead);
      const int r = first + s / segments, d = s % segments * segment + lane * V;
      const int b = r / params.tokens, patch = r - b * params.tokens - params.skip;
      if (r >= params.rows || patch < 0 || d >= params.width) continue;
      T* to = static_cast<T*>(params.mix.rows) + int64_t(r) * params.mix.num_blocks * params.width + d;
      mix_vector<T, V>(params.mix, b, patch, d, [&](int g, const float(&values)[V]) {
        store<V>(to + int64_t(g) * params.width, values);
      });
    }
    ptx::proxy_fence();
    __syncwarp();
    if (lane == 0) ptx::add_release(params.flags + 1 + first / gemm_tile_m, 1);
  }
}

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  Vector<T, 2> pair = {{narrow<T>(low), narrow<T>(high)}};
  return reinterpret_cast<const uint32_t&>(pair);
}

// Bias, activation and stores of one warpgroup's 64 x 256 accumulators. A quad exchanges its words so that every thread
// stores 16 bytes, a quad 64 of one row.
template <class T>
__device__ void store_tile(const GemmParams& params, const float (&d)[128], int row, int column) {
  const int thread = threadIdx.x % 128, lane = thread % 32, quad = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + thread / 32 * 16 + lane / 4 + 8 * h;
    const int b = r / params.tokens, patch = r - b * params.tokens - params.skip;
    const bool kept = r < params.rows && patch >= 0;
    const int64_t out = (int64_t(b) * (params.tokens - params.skip) + patch) * params.columns;
#pragma unroll
    for (int j = 0; j < 32; j += 4) {
      uint32_t y[4], z[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = column + (j + i) * 8 + quad * 2;
        float low = d[(j + i) * 4 + 2 * h], high = d[(j + i) * 4 + 2 * h + 1];
        if (params.bias != nullptr && n < params.columns) {
          float bias[2];
          load<2>(static_cast<const T*>(params.bias) + n, bias);
          low += bias[0];
          high += bias[1];
        }
        z[i] = pack<T>(low, high);
        if (params.activation == Activation::gelu) {
          low *= normal<T>(low).cdf;
          high *= normal<T>(high).cdf;
        }
        y[i] = pack<T>(low, high);
      }
      const int n = column + (j + quad) * 8;
      const bool inside = kept && n < params.columns;
      transpose_quad(y, lane);
      if (inside) *reinterpret_cast<uint4*>(static_cast<T*>(params.y) + out + n) = make_uint4(y[0], y[1], y[2], y[3]);
      if (params.z == nullptr) continue;
      transpose_quad(z, lane);
      if (inside) *reinterpret_cast<uint4*>(static_cast<T*>(params.z) + out + n) = make_uint4(z[0], z[1], z[2], z[3]);
    }
  }
}

} // namespace

template <class T>
__global__ void __launch_bounds__(threads, 1) gemm_sm90_kernel(const __grid_constant__ GemmParams params) {
  const Ring ring = {static_cast<unsigned char*>(dynamic_shared())};
  const Tiles tiles(params.rows, params.columns, params.grid);
  run_warpgroups(
      ring,
      [&] {
        multiply<T>(tiles, ring, params.num_blocks * (params.width / gemm_tile_k),
                    [&](const float(&d)[128], int row, int column) { store_tile<T>(params, d, row, column); });
      },
      [&](int thread) {
        if (thread == 0) copy_boxes(params, tiles, ring);
        else if (thread >= 32 && params.mix.num_terms > 0) mix_rows<T>(params, tiles, thread % 32);
      });
}

int gemm_sm90(const GemmParams& params, DType dtype, Stream stream) {
  const auto kernel = dtype == DType::bf16 ? gemm_sm90_kernel<__nv_bfloat16> : gemm_sm90_kernel<__half>;
  return launch_clusters(kernel, gemm_cluster, dim3(params.grid), threads, shared_bytes, stream, params);
}

} // namespace igva::cuda
