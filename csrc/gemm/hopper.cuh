// A persistent kernel of clusters of two blocks on Hopper, in each of which two warpgroups multiply and one copies.
//
//   warpgroups 0, 1  products: 64 x N each of a 128 x N tile, then what the kernel does with them
//   warpgroup 2      one thread lets the copy engine fill a ring of four stages; the other warps are left to the kernel
//
// Two blocks of a cluster work on adjacent tiles of 128 rows with the same rows of W, of which each copies one half to
// both: with N = 256, 32 KB from L2 per step and multiprocessor instead of 48.
#pragma once

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"
#include "gemm/hopper.h"

namespace igva::cuda {

constexpr int stages = 4; // as many as the shared memory of a multiprocessor holds of the wide form
constexpr int products_threads = 256, threads = 384;
constexpr int a_bytes = gemm_tile_m * gemm_tile_k * 2;
template <int N>
constexpr int b_bytes = N * gemm_tile_k * 2;
template <int N>
constexpr int stage_bytes = a_bytes + b_bytes<N>;
constexpr int barrier_bytes = 128;
// Of the ring and its barriers; the kernel's own memory lies behind them.
template <int N>
constexpr int ring_bytes = stages * stage_bytes<N> + barrier_bytes;

// A block has the registers of its launch and no more: what the product warpgroups take, the other one must have given
// up, or the kernel waits for ever.
constexpr int launch_registers = 65536 / threads / 8 * 8;
constexpr int products_registers = 200, others_registers = 104; // per thread, in steps of 8: accumulators take 128
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

// Pairs of tiles; a cluster works on one pair at a time.
template <int N>
struct Tiles {
  int across, down, rank, first, stride;
  __device__ Tiles(int rows, int columns, int grid)
      : across((columns + N - 1) / N),
        down((rows + gemm_cluster * gemm_tile_m - 1) / (gemm_cluster * gemm_tile_m)),
        rank(int(ptx::cluster_rank())),
        first(blockIdx.x / gemm_cluster),
        stride(grid / gemm_cluster) {}
  __device__ int count() const { return down * across; }
  // Neighbours share their rows of A; all of W stays in L2.
  __device__ int row(int pair) const { return (pair / across * gemm_cluster + rank) * gemm_tile_m; }
  __device__ int column(int pair) const { return pair % across * N; }
};

template <int N>
struct Ring {
  unsigned char* memory;
  __device__ unsigned char* a(int stage) const { return memory + stage * stage_bytes<N>; }
  __device__ unsigned char* b(int stage) const { return a(stage) + a_bytes; }
  __device__ uint64_t* full(int stage) const { return reinterpret_cast<uint64_t*>(memory + stages * stage_bytes<N>) + stage; }
  __device__ uint64_t* empty(int stage) const { return full(stages) + stage; }
  // Called by one thread: copies the box of A at (x, row), and this block's half of the box of W at (x_w, column) to
  // both blocks.
  __device__ void copy(const Stage& stage, const CUtensorMap* map, int x, int row, const CUtensorMap* weight, int x_w,
                       int column, int rank) const {
    uint64_t* const arrived = full(stage.index);
    ptx::barrier_wait(empty(stage.index), stage.parity ^ 1);
    ptx::barrier_arrive_expecting(arrived, stage_bytes<N>);
    ptx::copy_box(a(stage.index), map, arrived, x, row);
    ptx::copy_box_to((1 << gemm_cluster) - 1, b(stage.index) + rank * (b_bytes<N> / gemm_cluster), weight, arrived, x_w,
                     column + rank * (N / gemm_cluster));
  }
  // Each warp arrives for itself, having waited only for its own quarter of a product, and at both blocks, since both
  // copy into this stage.
  __device__ void release(int stage, int lane) const {
    if (lane < gemm_cluster) ptx::barrier_arrive(empty(stage), lane);
  }
};

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

// A warpgroup's products: for each tile start(column) requests what the accumulators begin with and returns how to set
// them, and finish(d, row, column) gets its 64 x N accumulators.
template <class T, int N, class Start, class Finish>
__device__ inline void multiply(const Tiles<N>& tiles, const Ring<N>& ring, int steps, Start start, Finish finish) {
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  Stage stage;
  for (int tile = tiles.first; tile < tiles.count(); tile += tiles.stride) {
    float d[N / 2];
    const auto set = start(tiles.column(tile));
    ptx::barrier_wait(ring.full(stage.index), stage.parity); // the request is under way meanwhile
    set(d);
    int before = -1; // the stage that is being read by products under way
    for (int step = 0; step < steps; ++step, stage.next()) {
      ptx::barrier_wait(ring.full(stage.index), stage.parity);
      const uint64_t a = ptx::matrix(ptx::shared_address(ring.a(stage.index)) + warpgroup * (a_bytes / 2));
      const uint64_t b = ptx::matrix(ptx::shared_address(ring.b(stage.index)));
      ptx::product_fence();
      // A step of k is 32 bytes, which matrices count in units of 16.
#pragma unroll
      for (int k = 0; k < gemm_tile_k / 16; ++k) ptx::product<T>(d, a + 2 * k, b + 2 * k);
      ptx::product_commit();
      ptx::product_wait<1>(d);
      if (before >= 0) ring.release(before, lane);
      before = stage.index;
    }
    ptx::product_wait<0>(d);
    ring.release(before, lane);
    finish(d, tiles.row(tile) + warpgroup * 64, tiles.column(tile));
  }
}

// The kernel: prepare() in every thread before any other part begins, products() in warpgroups 0 and 1, others(thread)
// in the threads of warpgroup 2. What it has done is visible to all threads of the cluster when it returns.
template <int N, class Prepare, class Products, class Others>
__device__ inline void run_warpgroups(const Ring<N>& ring, Prepare prepare, Products products, Others others) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      ptx::barrier_init(ring.full(stage), 1);
      ptx::barrier_init(ring.empty(stage), gemm_cluster * products_threads / 32);
    }
    ptx::barrier_init_fence();
  }
  prepare();
  ptx::cluster_sync();
  if (threadIdx.x >= products_threads) {
    ptx::give_registers<others_registers>();
    others(int(threadIdx.x) - products_threads);
  } else {
    ptx::take_registers<products_registers>();
    products();
  }
  ptx::cluster_sync(); // the other block may still arrive at barriers of this one
}

} // namespace igva::cuda
