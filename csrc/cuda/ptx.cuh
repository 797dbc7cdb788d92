// The instructions of sm_90a that C++ cannot express: barriers, the tensor copy engine, warpgroup matrix products,
// register reallocation. One wrapper per instruction.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace igva::cuda::ptx {

// A matrix at an address in shared memory, K-major, in rows of 128 bytes with the 128-byte swizzle; groups of 8 rows
// are adjacent. Fields: address / 16, offset between columns / 16 (not used here), between groups of rows / 16, kind of
// swizzle.
__device__ inline uint64_t matrix(uint32_t address) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

} // namespace igva::cuda::ptx

#ifdef IGVA_EMULATION
#include "ptx_emulation.h"
#else

namespace igva::cuda::ptx {

__device__ inline uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// ---- barriers in shared memory --------------------------------------------------------------------------------------

__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives at the barrier that block `rank` of the cluster keeps at the same place. It orders what finished
// products have read before the next copy, but no ordinary stores: a release at cluster scope would wait for L2.
__device__ inline void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Arrives, and lets the phase wait for `bytes` from the copy engine.
__device__ inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete. Copies are visible then; an acquire at cluster
// scope would empty the L1 cache every time.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- the cluster ----------------------------------------------------------------------------------------------------

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of the cluster; the diverged lanes of a warp meet first.
__device__ inline void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- the tensor copy engine -----------------------------------------------------------------------------------------

// The box of a 2-D map at column x, row y into shared memory; what lies outside the matrix is zeros, which count.
__device__ inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

// The same to the blocks of the cluster in `mask`: into their shared memory and their barrier, at the same places.
__device__ inline void copy_box_to(uint16_t mask, void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(mask)
      : "memory");
}

// Orders ordinary accesses to global memory and those of the copy engine.
__device__ inline void proxy_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- flags in global memory -----------------------------------------------------------------------------------------

__device__ inline int load_acquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// For a loop that waits; an acquire in it would order all other accesses of the thread every time.
__device__ inline int load_relaxed(const int* from) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ inline void sleep(uint32_t nanoseconds) { asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds)); }

// Returns the value before, and adds 1. The answer is not waited for before it is used: an addition of a constant would
// be shared out among the lanes of the warp at once, one that wraps is left alone.
__device__ inline int next_ticket(int* from) {
  int before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], 0x7fffffff;" : "=r"(before) : "l"(from) : "memory");
  return before;
}

// Returns the value before.
__device__ inline int add_acquire_release(int* to, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}

__device__ inline void add_release(int* to, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// ---- registers ------------------------------------------------------------------------------------------------------

template <int count>
__device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)); }

template <int count>
__device__ inline void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)); }

// ---- matrix products ------------------------------------------------------------------------------------------------

__device__ inline void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` committed groups are under way; the accumulators cannot be read before.
template <int pending, int count>
__device__ inline void product_wait(float (&d)[count]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  if constexpr (pending == 0) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
  }
}

// d [64 x N] += a [64 x 16] * b [N x 16]^T, asynchronously. Thread t of the warpgroup holds, for j < N / 8 and h < 2,
// d[16 * (t / 32) + t % 32 / 4 + 8 * h][8 * j + t % 4 * 2 + {0, 1}] in d[4 * j + 2 * h + {0, 1}].
#define IGVA_F8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
    "+f"(d[i + 6]), "+f"(d[i + 7])
#define IGVA_F32(i) IGVA_F8(i), IGVA_F8(i + 8), IGVA_F8(i + 16), IGVA_F8(i + 24)
#define IGVA_96 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
  "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51," \
  "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76," \
  "%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define IGVA_128 \
  IGVA_96 "," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115," \
  "%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define IGVA_PRODUCT(shape, type, registers, a_at, b_at, ...)                                                     \
  asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" registers "}, " a_at ", " b_at    \
               ", 1, 1, 1, 0, 0;"                                                                                 \
               : __VA_ARGS__                                                                                      \
               : "l"(a), "l"(b))
#define IGVA_PRODUCT_192(type) \
  IGVA_PRODUCT("m64n192k16", type, IGVA_96, "%96", "%97", IGVA_F32(0), IGVA_F32(32), IGVA_F32(64))
#define IGVA_PRODUCT_256(type) \
  IGVA_PRODUCT("m64n256k16", type, IGVA_128, "%128", "%129", IGVA_F32(0), IGVA_F32(32), IGVA_F32(64), IGVA_F32(96))

template <class T>
__device__ inline void product(float (&d)[96], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) IGVA_PRODUCT_192("bf16");
  else IGVA_PRODUCT_192("f16");
}
template <class T>
__device__ inline void product(float (&d)[128], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) IGVA_PRODUCT_256("bf16");
  else IGVA_PRODUCT_256("f16");
}

#undef IGVA_PRODUCT_256
#undef IGVA_PRODUCT_192
#undef IGVA_PRODUCT
#undef IGVA_128
#undef IGVA_96
#undef IGVA_F32
#undef IGVA_F8

} // namespace igva::cuda::ptx

#endif
