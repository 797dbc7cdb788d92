// The wrappers of ptx.cuh on a CPU. What the hardware does asynchronously happens as late as it may: a product is
// computed when it is waited for, so that a stage which is freed too early is seen; a copy reads at once, so that a
// source which is not complete is seen, and writes later, over NaN.
#pragma once

namespace emulation {

struct TensorMap {
  const unsigned char* data;
  int64_t rows, columns, row_stride;
  int box_rows;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

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
  phase_barriers.at(there(barrier, rank)).change(1, 0);
}
inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  phase_barriers.at(barrier).change(1, bytes);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const PhaseBarrier& state = phase_barriers.at(barrier);
  wait_until([&] { return state.phase != parity; });
}

inline uint32_t shared_address(const void* pointer) {
  return uint32_t(static_cast<const unsigned char*>(pointer) - current->block->shared);
}

inline void copy_box_to(uint16_t mask, void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  require(shared_address(to) % 1024 == 0, "a swizzled box starts at a multiple of 1024 bytes");
  TensorMap matrix;
  std::memcpy(&matrix, map, sizeof(matrix));
  std::vector<unsigned char> box(matrix.box_rows * 128);
  for (int i = 0; i < matrix.box_rows; ++i) {
    for (int j = 0; j < 64; ++j) {
      uint16_t value = 0;
      if (y + i < matrix.rows && x + j < matrix.columns) {
        std::memcpy(&value, matrix.data + ((y + i) * matrix.row_stride + x + j) * 2, 2);
      }
      std::memcpy(box.data() + swizzled(i * 128 + j * 2), &value, 2);
    }
  }
  for (int rank = 0; rank < 16; ++rank) {
    if (!(mask >> rank & 1)) continue;
    auto* out = there(static_cast<unsigned char*>(to), rank);
    PhaseBarrier* arrived = &phase_barriers.at(there(barrier, rank));
    std::memset(out, 0xff, box.size());
    copies.push_back([=] {
      std::memcpy(out, box.data(), box.size());
      arrived->change(0, -int64_t(box.size()));
    });
  }
}

inline void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  copy_box_to(1 << cluster_rank(), to, map, barrier, x, y);
}

inline void proxy_fence() {}

inline int load_acquire(const int* from) {
  yield();
  return *from;
}
inline int load_relaxed(const int* from) { return load_acquire(from); }
inline void sleep(uint32_t) {}
inline int next_ticket(int* from) { return (*from)++; }
inline int add_acquire_release(int* to, int value) {
  ++progress;
  return (*to += value) - value;
}
inline void add_release(int* to, int value) {
  *to += value;
  ++progress;
}

template <int count>
void take_registers() {}
template <int count>
void give_registers() {}

inline void product_fence() { __syncwarp(); } // instructions of a whole warp: none of its threads is behind
inline void product_commit() { products[current].groups.emplace_back(); }
template <int pending, int count>
void product_wait(float (&)[count]) {
  auto& groups = products[current].groups;
  while (int(groups.size()) - 1 > pending) {
    for (const auto& product : groups.front()) product();
    groups.pop_front();
  }
  __syncwarp();
}

template <class T, int count>
void product(float (&d)[count], uint64_t a, uint64_t b) {
  const unsigned char* shared = current->block->shared;
  const int thread = current->thread % 128;
  for (uint64_t matrix : {a, b}) {
    require(matrix >> 62 == 1 && (matrix >> 49 & 7) == 0, "a matrix has the 128-byte swizzle and an aligned start");
  }
  products[current].groups.back().push_back([=, &d] {
    // The fields of a descriptor: its start in bits 0 to 13, the step between groups of 8 rows in 32 to 45, both by 16.
    const auto at = [&](uint64_t matrix, int row, int k) {
      T value;
      const size_t start = (matrix & 0x3fff) << 4, step = (matrix >> 32 & 0x3fff) << 4;
      std::memcpy(&value, shared + swizzled(start + row / 8 * step + row % 8 * 128 + k * 2), 2);
      return float(value);
    };
    for (int h = 0; h < 2; ++h) {
      float row[16];
      for (int k = 0; k < 16; ++k) row[k] = at(a, thread / 32 * 16 + thread % 32 / 4 + 8 * h, k);
      for (int j = 0; j < count / 4; ++j) {
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
