// What every kernel is written with: the types of two dtypes, partial vectors, sums along a row. It expects the vector
// type `Vec` of an instruction set; see cpu/all_kernels.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "cpu/storage.h"

namespace {

using namespace igva;

template <class T>
struct VecOf {
  using type = Vec;
};
#ifdef IGVA_SCALAR
template <>
struct VecOf<double> {
  using type = Lane<double>;
};
#endif

// f(T{}) with the C++ type of a dtype.
template <class F>
inline bool dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float()), true;
    case DType::bf16: return f(bf16()), true;
    case DType::f16: return f(f16()), true;
#ifdef IGVA_SCALAR
    case DType::f64: return f(double()), true;
#endif
    default: return false;
  }
}

// f(A{}, B{}) with the C++ types of two dtypes; fp64 meets fp64 only, in the scalar build.
template <class A, class F>
inline bool dispatch_second(DType b, F f) {
  switch (b) {
    case DType::f32: return f(A(), float()), true;
    case DType::bf16: return f(A(), bf16()), true;
    case DType::f16: return f(A(), f16()), true;
    default: return false;
  }
}

template <class F>
inline bool dispatch(DType a, DType b, F f) {
  switch (a) {
    case DType::f32: return dispatch_second<float>(b, f);
    case DType::bf16: return dispatch_second<bf16>(b, f);
    case DType::f16: return dispatch_second<f16>(b, f);
#ifdef IGVA_SCALAR
    case DType::f64: return b == DType::f64 && (f(double(), double()), true);
#endif
    default: return false;
  }
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// The first n lanes, zeros after them.
template <class V, class T>
inline V load(const T* p, int64_t n) {
  if (n >= V::width) return V::load(p);
  T lanes[V::width] = {};
  memcpy(lanes, p, n * sizeof(T));
  return V::load(lanes);
}

// The same with `fill` instead of zeros.
template <class V>
inline V load_or(const typename V::Scalar* p, int64_t n, typename V::Scalar fill) {
  if (n >= V::width) return V::load(p);
  typename V::Scalar lanes[V::width];
  for (int i = 0; i < V::width; ++i) lanes[i] = i < n ? p[i] : fill;
  return V::load(lanes);
}

template <class V, class T>
inline void store(V v, T* p, int64_t n) {
  if (n >= V::width) return v.store(p);
  T lanes[V::width];
  v.store(lanes);
  memcpy(p, lanes, n * sizeof(T));
}

// n elements in another dtype.
template <class V, class In, class Out>
inline void copy_row(const In* from, int64_t n, Out* to) {
  for (int64_t i = 0; i < n; i += V::width) store(load<V>(from + i, n - i), to + i, n - i);
}

// The sum of what f(sum, i) adds for the vectors at i = 0, width, ..., the last of them partial. Several partial sums
// keep the rounding error small and the additions independent.
template <class V, class F>
inline typename V::Scalar sum_over(int64_t n, F f) {
  constexpr int U = V::width == 1 ? 16 : 4;
  V sums[U];
  for (int u = 0; u < U; ++u) sums[u] = V::set(0);
  int64_t i = 0;
  for (; i + U * V::width <= n; i += U * V::width) {
    for (int u = 0; u < U; ++u) sums[u] = f(sums[u], i + u * V::width);
  }
  for (; i < n; i += V::width) sums[0] = f(sums[0], i);
  for (int stride = U / 2; stride > 0; stride /= 2) {
    for (int u = 0; u < stride; ++u) sums[u] = sums[u] + sums[u + stride];
  }
  return sums[0].sum();
}

} // namespace
