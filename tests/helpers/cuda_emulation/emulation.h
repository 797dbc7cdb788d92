// Runs CUDA kernels on a CPU, compiled as plain C++: every thread is a fiber, barriers and shuffles switch to the next
// one. Blocks run one after the other; those of a kernel with clusters, which wait for each other, all at once.
//
// Environment: with IGVA_EMULATION_SEED, threads and the copies of the copy engine run in a random order;
// IGVA_EMULATION_RESIDENT is the most clusters that run at a time, as on a card that others use too;
// IGVA_EMULATION_MULTIPROCESSORS and IGVA_EMULATION_SHARED (bytes) are what the card has.
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
#include <random>
#include <tuple>
#include <unordered_map>
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

namespace emulation {

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

inline long setting(const char* name, long otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atol(value) : otherwise;
}

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
  const std::function<bool()>* waits = nullptr; // until this holds
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* body = nullptr;
inline long progress = 0; // counts what others may wait for, so that a deadlock is seen

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void wait_until(const std::function<bool()>& condition) {
  if (!condition()) {
    current->waits = &condition;
    yield();
    current->waits = nullptr;
  }
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

// A barrier in shared memory, whose phase waits for arrivals and for bytes from the copy engine.
struct PhaseBarrier {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void change(int arrived, int64_t expected) {
    missing -= arrived;
    bytes += expected;
    require(missing >= 0, "more arrivals at a barrier than it was made for");
    require(std::abs(bytes) < 1 << 20, "more bytes than a barrier can count");
    if (missing > 0 || bytes != 0) return;
    missing = arrivals;
    phase ^= 1;
    ++progress;
  }
};
inline std::unordered_map<const void*, PhaseBarrier> phase_barriers;

// What the copy engine has been asked for. It has read its source, and not written yet.
inline std::vector<std::function<void()>> copies;

// Products of one thread in flight, in committed groups; the last one is still open.
struct Products {
  std::deque<std::vector<std::function<void()>>> groups = {{}};
};
inline std::unordered_map<const Fiber*, Products> products;

// Copies of one thread to shared memory, in groups; the last one is still open. They write when they are waited for, over
// NaN.
struct VectorCopy {
  void* to;
  unsigned char bytes[16];
};
struct VectorCopies {
  std::deque<std::vector<VectorCopy>> groups = {{}};
  void wait(size_t pending) {
    for (; groups.size() - 1 > pending; groups.pop_front()) {
      for (const VectorCopy& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
    }
  }
};
inline std::unordered_map<const Fiber*, VectorCopies> vector_copies;

// Nothing may be left of a kernel: a barrier between two phases, a copy, a product.
inline void check_rest() {
  for (const auto& [address, barrier] : phase_barriers) {
    require(barrier.missing == barrier.arrivals && barrier.bytes == 0, "a barrier is left in the middle of a phase");
  }
  for (const auto& [fiber, own] : products) {
    require(own.groups.size() == 1 && own.groups[0].empty(), "a product is left that nobody waited for");
  }
  for (const auto& [fiber, own] : vector_copies) {
    for (const auto& group : own.groups) require(group.empty(), "a copy of a thread is left that it did not wait for");
  }
  require(copies.empty(), "a copy is left that nobody waited for");
  phase_barriers.clear();
  products.clear();
  vector_copies.clear();
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
  const long seed = setting("IGVA_EMULATION_SEED", -1);
  std::mt19937 random(seed);
  const auto one_in = [&](int n) { return seed < 0 || random() % n == 0; };
  std::vector<int> pace(total / 32 + 1); // of the warps: some are up to 8 times as slow as others
  for (int& own : pace) own = 1 << random() % 4;
  // Clusters start in order, each when there is room for it.
  const size_t cluster = blocks[first].cluster_size * size_t(blocks[first].threads);
  const size_t resident = setting("IGVA_EMULATION_RESIDENT", long(total));
  std::vector<size_t> order(total), left(total / cluster, cluster);
  for (size_t i = 0; i < total; ++i) order[i] = i;
  for (size_t unfinished = total, finished = 0, idle = 0; unfinished > 0;) {
    const long before = progress;
    if (seed >= 0) std::shuffle(order.begin(), order.end(), random);
    for (size_t i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.done || i / cluster >= finished + resident || !one_in(pace[i / 32])) continue;
      if (fiber.waits && !(*fiber.waits)()) continue;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
      if (!fiber.done) continue;
      --unfinished;
      if (--left[i / cluster] == 0) ++finished;
    }
    if (seed >= 0) std::shuffle(copies.begin(), copies.end(), random);
    const bool all = progress == before;
    while (!copies.empty() && (all || one_in(2))) {
      const auto copy = std::move(copies.back());
      copies.pop_back();
      copy();
      ++progress;
    }
    idle = progress == before ? idle + 1 : 0;
    require(idle < (seed < 0 ? 1 : 1000) || unfinished == 0, "deadlock: all threads wait");
  }
  check_rest();
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
      block.memory.assign(shared + 1024, 0xff); // NaN
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
inline unsigned __match_any_sync(unsigned mask, int value) {
  unsigned equal = 0;
  for (int lane = 0; lane < 32; ++lane) equal |= unsigned(__shfl_sync(mask, value, lane) == value) << lane;
  return equal;
}
inline int atomicAdd(int* to, int value) {
  const int old = *to;
  *to += value;
  return old;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __syncwarp() {
  emulation::arrive_and_wait(emulation::current->block->warps[emulation::current->thread / 32], 32);
}

namespace igva::cuda {

inline void* dynamic_shared() { return emulation::current->block->shared; }
template <class Vector>
inline void copy_async(Vector* to, const Vector* from) {
  emulation::VectorCopy copy = {to, {}};
  std::memcpy(copy.bytes, from, 16);
  std::memset(to, 0xff, 16);
  emulation::vector_copies[emulation::current].groups.back().push_back(copy);
}
inline void commit_copies() { emulation::vector_copies[emulation::current].groups.emplace_back(); }
template <int pending>
inline void wait_for_groups() { emulation::vector_copies[emulation::current].wait(pending); }
inline void wait_for_copies() {
  commit_copies();
  wait_for_groups<0>();
}
inline float approximate_exp2(float x) { return exp2f(x); }
inline float approximate_reciprocal(float x) { return 1 / x; }

template <class... Params>
int launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, void*, const Params&... params) {
  return emulation::launch_blocks(0, kernel, grid, threads, shared, params...);
}

template <class... Params>
int launch_clusters(void (*kernel)(Params...), int cluster, dim3 grid, int threads, size_t shared, void*, const Params&... params) {
  return emulation::launch_blocks(cluster, kernel, grid, threads, shared, params...);
}

} // namespace igva::cuda
