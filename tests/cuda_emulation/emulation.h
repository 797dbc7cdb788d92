// Runs CUDA kernels on a CPU, compiled as plain C++: every thread is a fiber, barriers and shuffles switch to the next one.
// Blocks run one after the other; those of a kernel with clusters, which wait for each other, all at once.
#pragma once

#define IGVA_EMULATION

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

using std::abs;
using std::max;
using std::min;
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }

namespace emulation {

struct Barrier {
  int expected = 0, arrived = 0;
  long generation = 0;
};

struct Block {
  dim3 index;
  int threads = 0;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<unsigned long long> lanes; // what a shuffle hands round
  Barrier* cluster = nullptr;
  int cluster_size = 1;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
};

struct Fiber {
  ucontext_t context;
  Block* block;
  int thread;
  bool done = false;
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* body = nullptr;
inline long progress = 0; // counts what others may wait for, so that a deadlock is seen

inline void yield() { swapcontext(&current->context, &scheduler); }

template <class Condition>
void wait_until(Condition condition) {
  while (!condition()) yield();
  ++progress;
}

inline void arrive_and_wait(Barrier& barrier, int expected) {
  const long generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++progress;
    return;
  }
  wait_until([&] { return barrier.generation != generation; });
}

inline void entry() {
  (*body)();
  current->done = true;
  ++progress;
  swapcontext(&current->context, &scheduler);
}

constexpr size_t stack_bytes = 64 << 10;
inline std::vector<std::unique_ptr<char[]>> stacks; // kept: fresh memory costs more than the kernels

inline void run(std::vector<Block>& blocks, size_t first, size_t count, const std::function<void()>& kernel) {
  std::vector<Fiber> fibers;
  size_t total = 0;
  for (size_t b = first; b < first + count; ++b) total += blocks[b].threads;
  fibers.reserve(total);
  for (size_t b = first; b < first + count; ++b) {
    for (int t = 0; t < blocks[b].threads; ++t) {
      Fiber& fiber = fibers.emplace_back();
      if (stacks.size() < fibers.size()) stacks.emplace_back(new char[stack_bytes]);
      fiber.block = &blocks[b];
      fiber.thread = t;
      getcontext(&fiber.context);
      fiber.context.uc_stack = {stacks[fibers.size() - 1].get(), 0, stack_bytes};
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, entry, 0);
    }
  }
  body = &kernel;
  for (size_t left = total; left > 0;) {
    const long before = progress;
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
      if (fiber.done) --left;
    }
    if (progress == before && left > 0) {
      std::fprintf(stderr, "emulation: deadlock, %zu threads wait\n", left);
      std::abort();
    }
  }
}

template <class... Params>
int launch_blocks(int cluster, void (*kernel)(Params...), dim3 grid, int threads, size_t shared,
                  const Params&... params) {
  const size_t count = size_t(grid.x) * grid.y;
  const bool together = cluster > 0;
  if (together && count % cluster != 0) std::abort();
  std::vector<Block> blocks(count);
  std::vector<Barrier> clusters(together ? count / cluster : 0);
  for (size_t b = 0; b < count; ++b) {
    Block& block = blocks[b];
    block.index = dim3(unsigned(b % grid.x), unsigned(b / grid.x));
    block.threads = threads;
    if (together) {
      block.cluster = &clusters[b / cluster];
      block.cluster_size = cluster;
    }
    block.warps.resize((threads + 31) / 32);
    block.lanes.resize(threads);
    if (together) {
      block.memory.assign(shared + 1024, 0xcd);
      block.shared = block.memory.data() + (1024 - reinterpret_cast<uintptr_t>(block.memory.data()) % 1024) % 1024;
    }
  }
  std::vector<unsigned char> memory(together ? 0 : shared + 1024);
  const std::function<void()> call = [&] { kernel(params...); };
  if (together) {
    run(blocks, 0, count, call);
  } else {
    for (size_t b = 0; b < count; ++b) {
      blocks[b].shared = memory.data() + (1024 - reinterpret_cast<uintptr_t>(memory.data()) % 1024) % 1024;
      run(blocks, b, 1, call);
    }
  }
  return 0;
}

struct Index {
  unsigned x, y, z;
};
inline Index thread_index() { return {unsigned(current->thread), 0, 0}; }
inline Index block_index() { return {current->block->index.x, current->block->index.y, 0}; }

} // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())

inline void __syncthreads() { emulation::arrive_and_wait(emulation::current->block->all, emulation::current->block->threads); }

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  emulation::Block& block = *emulation::current->block;
  const int thread = emulation::current->thread, warp = thread / 32;
  std::memcpy(&block.lanes[thread], &value, sizeof(T));
  emulation::arrive_and_wait(block.warps[warp], 32);
  T result;
  std::memcpy(&result, &block.lanes[warp * 32 + source % 32], sizeof(T));
  emulation::arrive_and_wait(block.warps[warp], 32);
  return result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, (emulation::current->thread % 32) ^ lanes);
}
inline void __syncwarp() {
  emulation::arrive_and_wait(emulation::current->block->warps[emulation::current->thread / 32], 32);
}

namespace igva::cuda {

inline void* dynamic_shared() { return emulation::current->block->shared; }

template <class... Params>
int launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, void*, const Params&... params) {
  return emulation::launch_blocks(0, kernel, grid, threads, shared, params...);
}

template <class... Params>
int launch_clusters(void (*kernel)(Params...), int cluster, dim3 grid, int threads, size_t shared, void*, const Params&... params) {
  return emulation::launch_blocks(cluster, kernel, grid, threads, shared, params...);
}

} // namespace igva::cuda
