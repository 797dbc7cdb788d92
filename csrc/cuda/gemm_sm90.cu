// The first Linear with the mix hidden behind it, on Hopper: one persistent kernel mixes and multiplies at once.
//
//   Y[out(r), n] = act(sum over k of A[r, k] * W[n, k] + bias[n]),   Z the same before act, if asked for
//
// Rows r = b * T + t are flat, skipped tokens included (0.17 % waste for a CLS token), so that a block of A that is a tap
// is read by the copy engine where the layer lies; out(r) drops the skipped tokens in the store. Mixed blocks are written
// to a scratch F [rows, blocks * D] by three warps a multiprocessor, ahead of the products that read them:
//
//   warpgroups 0, 1  products: 64 x 256 each of a 128 x 256 tile, then bias, activation, stores
//   warpgroup 2      warp 0: the copy engine fills a ring of four stages; taps first, they need no mix
//                    warps 1-3: mix 8 rows at a time, claimed from a ticket in the order of the rows
//
// Two blocks of a cluster work on adjacent tiles of 128 rows with the same rows of W, of which each copies one half to
// both: 32 KB from L2 a step and multiprocessor instead of 48, beside the layers that the mixers read.
//
// A block of 128 rows of F has a flag that counts its mixed groups of 8. The copy warp waits for it before the first box of
// F. Mixers never wait, and a group is only claimed by one that runs, so no launch depends on how many blocks are resident.
// F is written by ordinary stores and read by the copy engine: a proxy fence stands on both sides of the flag. Ticket and
// flags are zero at launch; the caller clears them on the same stream, which a graph captures.
//
// Modelled (H200, 790 TFLOP/s, 4.3 TB/s, CLIP-L/336 and IGVA; not measured): products 12.2 us an image, the mix 7.1 us
// beside them. Without mixed blocks (a concat of taps) the mixers leave at once.
#include "gemm_sm90.h"

#include "activation.cuh"
#include "mix_vector.cuh"
#include "ptx.cuh"

namespace igva::cuda {

namespace {

constexpr int stages = 4;
constexpr int products_threads = 256, threads = 384;
constexpr int a_bytes = gemm_tile_m * gemm_tile_k * 2, b_bytes = gemm_tile_n * gemm_tile_k * 2;
constexpr int stage_bytes = a_bytes + b_bytes;
constexpr int shared_bytes = stages * stage_bytes + 1024; // the barriers stand behind the ring

// A block has the registers of its launch and no more: what the products take, the others must have given, or the kernel
// waits for ever.
constexpr int launch_registers = 65536 / threads / 8 * 8;
constexpr int products_registers = 208, others_registers = 88;
static_assert(products_threads * products_registers + (threads - products_threads) * others_registers <=
              threads * launch_registers);

// Where a pipeline stands in the ring.
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++index < stages) return;
    index = 0;
    parity ^= 1;
  }
};

// Pairs of tiles, one a cluster at a time.
struct Tiles {
  int across, down, rank, first, stride;
  __device__ explicit Tiles(const GemmParams& params)
      : across((params.columns + gemm_tile_n - 1) / gemm_tile_n),
        down((params.rows + gemm_cluster * gemm_tile_m - 1) / (gemm_cluster * gemm_tile_m)),
        rank(int(ptx::cluster_rank())),
        first(blockIdx.x / gemm_cluster),
        stride(params.grid / gemm_cluster) {}
  __device__ int count() const { return down * across; }
  // Neighbours share their rows of A; all of W stays in L2.
  __device__ int row(int pair) const { return (pair / across * gemm_cluster + rank) * gemm_tile_m; }
  __device__ int column(int pair) const { return pair % across * gemm_tile_n; }
  __device__ int mix_groups() const { return down * gemm_cluster * (gemm_tile_m / gemm_mix_rows); }
};

struct Ring {
  unsigned char* memory;
  __device__ unsigned char* a(int stage) const { return memory + stage * stage_bytes; }
  __device__ unsigned char* b(int stage) const { return a(stage) + a_bytes; }
  __device__ uint64_t* full(int stage) const { return reinterpret_cast<uint64_t*>(memory + stages * stage_bytes) + stage; }
  __device__ uint64_t* empty(int stage) const { return full(stages) + stage; }
  // Each warp speaks for itself, having waited for its own quarter of a product only; to both blocks, which both copy here.
  __device__ void release(int stage, int lane) const {
    if (lane < gemm_cluster) ptx::barrier_arrive(empty(stage), lane);
  }
};

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
        ptx::barrier_wait(ring.empty(stage.index), stage.parity ^ 1);
        ptx::barrier_arrive_expecting(ring.full(stage.index), stage_bytes);
        ptx::copy_box(ring.a(stage.index), &params.a[block.map], ring.full(stage.index),
                      block.offset + step * gemm_tile_k, row);
        ptx::copy_box_to((1 << gemm_cluster) - 1, ring.b(stage.index) + tiles.rank * (b_bytes / gemm_cluster), &params.w,
                         ring.full(stage.index), block.position * params.width + step * gemm_tile_k,
                         column + tiles.rank * (gemm_tile_n / gemm_cluster));
      }
    }
  }
}

// A warp: groups of rows in order, each mixed 32 vectors at a time while the next ones come to L2.
template <class T>
__device__ void mix_rows(const GemmParams& params, const Tiles& tiles, int lane) {
  constexpr int V = vector_width<T>, segment = 32 * V; // elements a warp mixes at a time
  constexpr int ahead = 2;                             // segments that are asked for before they are mixed
  const int groups = tiles.mix_groups();
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
    if (lane == 0) {
      __threadfence();
      ptx::add_release(params.flags + 1 + first / gemm_tile_m, 1);
    }
  }
}

// The words of a quad, transposed: lane q of four gets word q of each, in the order of the lanes.
__device__ inline void transpose_quad(uint32_t (&word)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool upper = lane & bit;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? word[i] : word[i | bit], bit);
      if (upper) word[i] = received;
      else word[i | bit] = received;
    }
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
__device__ void store_tile(const GemmParams& params, const float (&d)[128], int row, int column, int thread) {
  const int lane = thread % 32, quad = lane % 4;
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

template <class T>
__device__ void multiply(const GemmParams& params, const Tiles& tiles, const Ring& ring, int warpgroup, int thread) {
  const int steps = params.num_blocks * (params.width / gemm_tile_k);
  Stage stage;
  for (int tile = tiles.first; tile < tiles.count(); tile += tiles.stride) {
    float d[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) d[i] = 0;
    int before = -1; // the stage that is being read by products under way
    for (int step = 0; step < steps; ++step, stage.next()) {
      ptx::barrier_wait(ring.full(stage.index), stage.parity);
      const uint64_t a = ptx::matrix(ring.a(stage.index) + warpgroup * (a_bytes / 2));
      const uint64_t b = ptx::matrix(ring.b(stage.index));
      ptx::product_fence();
#pragma unroll
      for (int k = 0; k < gemm_tile_k / 16; ++k) ptx::product<T>(d, a + 2 * k, b + 2 * k); // 32 bytes on, in units of 16
      ptx::product_commit();
      ptx::product_wait<1>(d);
      if (before >= 0) ring.release(before, thread % 32);
      before = stage.index;
    }
    ptx::product_wait<0>(d);
    ring.release(before, thread % 32);
    store_tile<T>(params, d, tiles.row(tile) + warpgroup * 64, tiles.column(tile), thread);
  }
}

} // namespace

template <class T>
__global__ void __launch_bounds__(threads, 1) gemm_sm90_kernel(const __grid_constant__ GemmParams params) {
  const Ring ring = {static_cast<unsigned char*>(dynamic_shared())};
  const Tiles tiles(params);
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      ptx::barrier_init(ring.full(stage), 1);
      ptx::barrier_init(ring.empty(stage), gemm_cluster * products_threads / 32);
    }
    ptx::barrier_init_fence();
  }
  ptx::cluster_sync();
  if (warpgroup == 2) {
    ptx::give_registers<others_registers>();
    if (thread == 0) copy_boxes(params, tiles, ring);
    else if (thread >= 32 && params.mix.num_terms > 0) mix_rows<T>(params, tiles, thread % 32);
  } else {
    ptx::take_registers<products_registers>();
    multiply<T>(params, tiles, ring, warpgroup, thread);
  }
  ptx::cluster_sync(); // the other block still arrives at barriers here
}

int gemm_sm90(const GemmParams& params, DType dtype, Stream stream) {
  const auto kernel = dtype == DType::bf16 ? gemm_sm90_kernel<__nv_bfloat16> : gemm_sm90_kernel<__half>;
  return launch_clusters(kernel, gemm_cluster, dim3(params.grid), threads, shared_bytes, stream, params);
}

} // namespace igva::cuda
