// The wrappers of ptx.cuh on a CPU. What the hardware does asynchronously happens as late as it may: a product is computed
// when it is waited for, so that a stage which is freed too early is seen. A barrier that is never completed is a deadlock,
// which the scheduler reports.
#pragma once

#include <cuda.h>

#include <deque>
#include <unordered_map>

inline void __threadfence() {}
inline int atomicAdd(int* to, int value) {
  const int old = *to;
  *to += value;
  return old;
}

namespace emulation {

struct TensorMap {
  const unsigned char* data;
  int64_t rows, columns, row_stride;
  int box_rows;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

struct PhaseBarrier {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void check() {
    if (missing > 0 || bytes != 0) return;
    missing = arrivals;
    phase ^= 1;
    ++progress;
  }
};

inline std::unordered_map<const void*, PhaseBarrier> phase_barriers;

// Products of one thread in flight, in committed groups; the last one is still open.
struct Products {
  std::deque<std::vector<std::function<void()>>> groups = {{}};
};
inline std::unordered_map<const Fiber*, Products> products;

// The byte that the 128-byte swizzle keeps at this place; addresses count from an aligned start.
inline size_t swizzled(size_t at) { return at ^ ((at >> 7 & 7) << 4); }

} // namespace emulation

namespace igva::cuda::ptx {

using namespace emulation;

inline void barrier_init(uint64_t* barrier, int arrivals) { phase_barriers[barrier] = {arrivals, arrivals, 0, 0}; }
inline void barrier_init_fence() {}
inline uint32_t cluster_rank() { return current->block->index.x % current->block->cluster_size; }
inline void cluster_sync() {
  Block& block = *current->block;
  arrive_and_wait(*block.cluster, block.threads * block.cluster_size);
}

// What block `rank` of the cluster keeps at the same place.
template <class T>
T* there(T* here, uint32_t rank) {
  const Block& block = *current->block;
  const Block& other = *(&block - cluster_rank() + rank);
  const auto offset = reinterpret_cast<unsigned char*>(here) - block.shared;
  return reinterpret_cast<T*>(other.shared + offset);
}

inline void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  PhaseBarrier& state = phase_barriers.at(there(barrier, rank));
  --state.missing;
  state.check();
}
inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  PhaseBarrier& state = phase_barriers.at(barrier);
  state.bytes += bytes;
  --state.missing;
  state.check();
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const PhaseBarrier& state = phase_barriers.at(barrier);
  wait_until([&] { return state.phase != parity; });
}

inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  TensorMap matrix;
  std::memcpy(&matrix, map, sizeof(matrix));
  auto* out = static_cast<unsigned char*>(to);
  for (int i = 0; i < matrix.box_rows; ++i) {
    for (int j = 0; j < 64; ++j) {
      uint16_t value = 0;
      if (y + i < matrix.rows && x + j < matrix.columns) {
        std::memcpy(&value, matrix.data + ((y + i) * matrix.row_stride + x + j) * 2, 2);
      }
      std::memcpy(out + swizzled(i * 128 + j * 2), &value, 2);
    }
  }
  PhaseBarrier& state = phase_barriers.at(barrier);
  state.bytes -= matrix.box_rows * 128;
  state.check();
}

inline void copy_box_to(uint16_t mask, void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  for (int rank = 0; rank < 16; ++rank) {
    if (mask >> rank & 1) {
      copy_box(there(static_cast<unsigned char*>(to), rank), map, there(barrier, rank), x, y);
    }
  }
}

inline void prefetch_l2(const void* from, uint32_t bytes) {
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
}
inline void proxy_fence() {}

inline int load_acquire(const int* from) {
  yield();
  return *from;
}
inline void add_release(int* to, int value) {
  *to += value;
  ++progress;
}

template <int count>
void take_registers() {}
template <int count>
void give_registers() {}

inline void product_fence() {}
inline void product_commit() { products[current].groups.emplace_back(); }
template <int pending>
void product_wait(float (&)[128]) {
  auto& groups = products[current].groups;
  while (int(groups.size()) - 1 > pending) {
    for (const auto& product : groups.front()) product();
    groups.pop_front();
  }
}

inline uint64_t matrix(const void* pointer) {
  return uint64_t(static_cast<const unsigned char*>(pointer) - current->block->shared) >> 4;
}

template <class T>
void product(float (&d)[128], uint64_t a, uint64_t b) {
  const unsigned char* shared = current->block->shared;
  const int thread = current->thread % 128;
  products[current].groups.back().push_back([=, &d] {
    const auto at = [&](uint64_t start, int row, int k) {
      T value;
      std::memcpy(&value, shared + swizzled(size_t(start << 4) + row / 8 * 1024 + row % 8 * 128 + k * 2), 2);
      return float(value);
    };
    for (int h = 0; h < 2; ++h) {
      float row[16];
      for (int k = 0; k < 16; ++k) row[k] = at(a, thread / 32 * 16 + thread % 32 / 4 + 8 * h, k);
      for (int j = 0; j < 32; ++j) {
        for (int e = 0; e < 2; ++e) {
          float sum = 0;
          for (int k = 0; k < 16; ++k) sum += row[k] * at(b, 8 * j + thread % 4 * 2 + e, k);
          d[4 * j + 2 * h + e] += sum;
        }
      }
    }
  });
}

} // namespace igva::cuda::ptx
