// What the portable kernels share: dtypes, 16-byte vectors, the place of a thread in [rows, width], reductions,
// launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "common/operands.h"
#include "cuda/host.h"

namespace igva::cuda {

constexpr int block_threads = 256; // per block of every kernel but the Hopper GEMMs

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Wide = typename Accumulator<T>::type;

// Elements of a 16-byte vector.
template <class T>
constexpr int vector_width = 16 / sizeof(T);

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vector {
  T element[V];
};

template <class W>
__device__ inline W widen(float x) { return W(x); }
template <class W>
__device__ inline W widen(double x) { return W(x); }
template <class W>
__device__ inline W widen(__nv_bfloat16 x) { return W(__bfloat162float(x)); }
template <class W>
__device__ inline W widen(__half x) { return W(__half2float(x)); }

template <class T, class W>
__device__ inline T narrow(W x) {
  if constexpr (sizeof(T) > 2) return T(x);
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(float(x));
  else return __float2bfloat16_rn(float(x));
}

// Pairs of 16-bit elements stay packed until they are used: one register for two.
template <int V, class T, class W>
__device__ inline void widen(const Vector<T, V>& from, W (&to)[V]) {
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    const auto* words = reinterpret_cast<const uint32_t*>(&from);
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const uint32_t word = words[i / 2];
      if constexpr (std::is_same_v<T, __half>) {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
        to[i] = W(pair.x);
        to[i + 1] = W(pair.y);
      } else { // bf16 is the upper half of fp32: one instruction each, where the toolkit's function takes two
        to[i] = W(__uint_as_float(word << 16));
        to[i + 1] = W(__uint_as_float(word & 0xffff0000u));
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = widen<W>(from.element[i]);
  }
}

// Reads a vector 16 bytes at a time, as all kernels do. It is copied before anything uses it, since elements that are
// used where they lie in memory are loaded one by one; and it stays packed in its registers, since the compiler would
// widen it at once, and spill.
template <int V, class T>
__device__ inline Vector<T, V> fetch(const T* from) {
  Vector<T, V> vector = *reinterpret_cast<const Vector<T, V>*>(from);
#ifdef IGVA_EMULATION
  emulation::require(reinterpret_cast<uintptr_t>(from) % alignof(Vector<T, V>) == 0, "a vector begins where none may");
#else
  if constexpr (sizeof(vector) % 16 == 0) {
    auto* words = reinterpret_cast<uint32_t*>(&vector);
#pragma unroll
    for (int i = 0; i < int(sizeof(vector) / 4); ++i) asm volatile("" : "+r"(words[i]));
  }
#endif
  return vector;
}

template <int V, class T, class W>
__device__ inline void load(const T* from, W (&to)[V]) {
  widen<V>(fetch<V>(from), to);
}

template <int V, class T, class W>
__device__ inline void store(T* to, const W (&from)[V]) {
  Vector<T, V> vector;
#pragma unroll
  for (int i = 0; i < V; ++i) vector.element[i] = narrow<T>(from[i]);
  *reinterpret_cast<Vector<T, V>*>(to) = vector;
}

// Stores fp32 values in a dtype chosen at run time (fp64 values always in fp64): a uniform branch instead of a kernel
// for each pair of dtypes.
template <int V>
__device__ inline void store(void* to, DType dtype, int64_t at, const float (&from)[V]) {
  if (dtype == DType::bf16) store<V>(static_cast<__nv_bfloat16*>(to) + at, from);
  else if (dtype == DType::f16) store<V>(static_cast<__half*>(to) + at, from);
  else store<V>(static_cast<float*>(to) + at, from);
}
template <int V>
__device__ inline void store(void* to, DType, int64_t at, const double (&from)[V]) {
  store<V>(static_cast<double*>(to) + at, from);
}

// Loads values of a dtype chosen at run time.
template <int V, class W>
__device__ inline void load(const void* from, DType dtype, int64_t at, W (&to)[V]) {
  switch (dtype) {
    case DType::bf16: return load<V>(static_cast<const __nv_bfloat16*>(from) + at, to);
    case DType::f16: return load<V>(static_cast<const __half*>(from) + at, to);
    case DType::f64: return load<V>(static_cast<const double*>(from) + at, to);
    default: return load<V>(static_cast<const float*>(from) + at, to);
  }
}

// The vector that a thread of a one-dimensional grid owns in a matrix of `vectors` vectors per row. Only the
// block's first vector takes a 64-bit division; what a thread adds to it fits in 32 bits.
struct Place {
  int64_t row;
  int vector;
};
__device__ inline Place place(int64_t block, int thread, int vectors) {
  const int64_t first = block * block_threads;
  const int64_t row = first / vectors;
  const int offset = int(first - row * vectors) + thread;
  return {row + offset / vectors, offset % vectors};
}

inline unsigned blocks_for(int64_t threads) { return unsigned((threads + block_threads - 1) / block_threads); }

// The image that row b reads, or -1 where there is no such image.
__device__ inline int64_t image_of(const int64_t* image_index, int64_t b, int64_t num_images) {
  if (image_index == nullptr) return b;
  const int64_t image = image_index[b];
  return image >= 0 && image < num_images ? image : -1;
}

// The sum of every thread's value, for all of them, always in the same order. `scratch` holds one value per warp.
template <class W>
__device__ inline W block_sum(W value, W* scratch) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  __syncthreads(); // until the sum before this one has been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  W sum = 0;
#pragma unroll
  for (int warp = 0; warp < block_threads / 32; ++warp) sum += scratch[warp];
  return sum;
}

#ifndef IGVA_EMULATION // tests run the kernels on a CPU: threads are fibers there
// 2^x and 1 / x to about 22 bits; denormal numbers become zero, which __expf and __fdividef spend instructions to
// avoid.
__device__ inline float approximate_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Starts to copy a vector, of 16 bytes, to shared memory; and waits for what this thread has started.
template <class Vector>
__device__ inline void copy_async(Vector* to, const Vector* from) {
  static_assert(sizeof(Vector) == 16);
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// What this thread has started since the last commit becomes a group; waits until at most `pending` groups, the last
// ones, are under way.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ inline void wait_for_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

__device__ inline void* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return shared;
}

// Launches clusters of `cluster` blocks.
template <class... Params>
int launch_clusters(void (*kernel)(Params...), int cluster, dim3 grid, int threads, size_t shared, Stream stream,
                    const Params&... params) {
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  if (shared > 32 * 1024) { // the 48 KB that need no opt-in include static shared memory
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

template <class... Params>
int launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, Stream stream, const Params&... params) {
  return launch_clusters(kernel, 1, grid, threads, shared, stream, params...);
}
#endif

// Calls f with a value of the type that `dtype` names.
template <class F>
int with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::bf16: return f(__nv_bfloat16());
    case DType::f16: return f(__half());
    default: return f(double());
  }
}

} // namespace igva::cuda
