// The activations and their derivatives on a device, as torch defines them; T is the type in memory, W float or double.
#pragma once

#include "common/activations.h"
#include "cuda/common.cuh"

namespace igva::cuda {

// The standard normal distribution function and its density.
template <class W>
struct Normal {
  W cdf, density;
};
template <class T, class W>
__device__ inline Normal<W> normal(W x) {
  if constexpr (sizeof(T) == 2) {
    // erfc by Abramowitz and Stegun 7.1.26, within 1.5e-7, far below the rounding of a 16-bit result: an exact one
    // would cost more than the memory traffic, and stand in the way of the next tile of a matrix product. The
    // polynomial is halved, and its argument is 1 / (1 + 0.3275911 |x| / sqrt(2)).
    const float u = fabsf(x) * 0.84932180f, gauss = approximate_exp2(-u * u); // exp(-x^2 / 2)
    const float k = approximate_reciprocal(fmaf(0.23164189f, fabsf(x), 1.0f));
    float tail = fmaf(0.5307027145f, k, -0.7265760135f);
    tail = fmaf(tail, k, 0.7107068705f);
    tail = fmaf(tail, k, -0.142248368f);
    tail = fmaf(tail, k, 0.127414796f) * k * gauss;
    return {x < 0 ? tail : 1.0f - tail, 0.39894228f * gauss};
  } else {
    // erfc keeps the relative precision of the left tail.
    return {W(0.5) * erfc(x * W(-0.70710678118654752440)), W(0.39894228040143267794) * exp(W(-0.5) * x * x)};
  }
}

// gelu_tanh(x) = x * sigmoid(2 * inner(x)), inner(x) = sqrt(2 / pi) * (x + 0.044715 x^3).
template <class W>
__device__ inline W twice_inner(W x) { return x * (W(1.5957691216057308) + W(0.07135481627260025) * x * x); }

// sigmoid(x), and its derivative without cancellation.
template <class W>
struct Sigmoid {
  W value, slope;
};
template <class W>
__device__ inline Sigmoid<W> sigmoid(W x) {
  const W e = exp(-abs(x)), inverse = W(1) / (W(1) + e), small = e * inverse;
  return {x <= W(0) ? small : inverse, small * inverse};
}

// For each activation: act(x) and act'(x).
template <Activation activation>
struct Formula {
  static_assert(activation == Activation::none, "this activation of IGVA_ACTIVATIONS has no formula for CUDA");
  template <class T, class W>
  __device__ static W value(W x) { return x; }
  template <class T, class W>
  __device__ static W slope(W) { return W(1); }
};

template <>
struct Formula<Activation::gelu> {
  template <class T, class W>
  __device__ static W value(W x) { return x * normal<T>(x).cdf; }
  template <class T, class W>
  __device__ static W slope(W x) {
    const Normal<W> n = normal<T>(x);
    return n.cdf + x * n.density;
  }
};

template <>
struct Formula<Activation::gelu_tanh> {
  template <class T, class W>
  __device__ static W value(W x) { return x * sigmoid(twice_inner(x)).value; }
  template <class T, class W>
  __device__ static W slope(W x) {
    const Sigmoid<W> s = sigmoid(twice_inner(x));
    return s.value + x * s.slope * (W(1.5957691216057308) + W(0.21406444881780076) * x * x);
  }
};

template <>
struct Formula<Activation::relu> {
  template <class T, class W>
  __device__ static W value(W x) { return x <= W(0) ? W(0) : x; } // NaN stays NaN
  template <class T, class W>
  __device__ static W slope(W x) { return x <= W(0) ? W(0) : W(1); }
};

template <>
struct Formula<Activation::silu> {
  template <class T, class W>
  __device__ static W value(W x) { return x * sigmoid(x).value; }
  template <class T, class W>
  __device__ static W slope(W x) {
    const Sigmoid<W> s = sigmoid(x);
    return s.value + x * s.slope;
  }
};

template <class T, class W>
__device__ inline W act(Activation activation, W x) {
  switch (activation) {
    case Activation::none: return Formula<Activation::none>::value<T>(x);
#define IGVA_CASE(name) \
  case Activation::name: return Formula<Activation::name>::value<T>(x);
    IGVA_ACTIVATIONS(IGVA_CASE)
#undef IGVA_CASE
  }
  __builtin_unreachable(); // the list is complete
}

template <class T, class W>
__device__ inline W act_slope(Activation activation, W x) {
  switch (activation) {
    case Activation::none: return Formula<Activation::none>::slope<T>(x);
#define IGVA_CASE(name) \
  case Activation::name: return Formula<Activation::name>::slope<T>(x);
    IGVA_ACTIVATIONS(IGVA_CASE)
#undef IGVA_CASE
  }
  __builtin_unreachable(); // the list is complete
}

} // namespace igva::cuda
