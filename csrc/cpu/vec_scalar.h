// Vectors of one lane: the fallback on any machine, and fp64 everywhere.
#pragma once

#include <cmath>

#include "cpu/storage.h"

namespace {

template <class S>
struct Lane {
  using Scalar = S;
  static constexpr int width = 1;
  static constexpr int product_rows = 4;
  S v;

  static Lane set(S x) { return {x}; }
  static Lane load(const S* p) { return {*p}; }
  static Lane load(const bf16* p) { return {S(to_float(*p))}; }
  static Lane load(const f16* p) { return {S(to_float(*p))}; }
  void store(S* p) const { *p = v; }
  void store(bf16* p) const { *p = to_bf16(float(v)); }
  void store(f16* p) const { *p = to_f16(float(v)); }
  template <class T>
  void stream(T* p) const { store(p); }
  S sum() const { return v; }
};

template <class S> inline Lane<S> operator+(Lane<S> a, Lane<S> b) { return {a.v + b.v}; }
template <class S> inline Lane<S> operator-(Lane<S> a, Lane<S> b) { return {a.v - b.v}; }
template <class S> inline Lane<S> operator*(Lane<S> a, Lane<S> b) { return {a.v * b.v}; }
template <class S> inline Lane<S> operator/(Lane<S> a, Lane<S> b) { return {a.v / b.v}; }
template <class S> inline Lane<S> fma(Lane<S> a, Lane<S> b, Lane<S> c) { return {a.v * b.v + c.v}; }
template <class S> inline Lane<S> abs(Lane<S> a) { return {std::fabs(a.v)}; }
// x <= y ? a : b, where a NaN in x or y chooses b.
template <class S> inline Lane<S> if_le(Lane<S> x, Lane<S> y, Lane<S> a, Lane<S> b) { return {x.v <= y.v ? a.v : b.v}; }
template <class S> inline Lane<S> exp(Lane<S> x) { return {std::exp(x.v)}; }

inline void stream_fence() {}

} // namespace
