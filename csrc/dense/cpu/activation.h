// The activations and their derivatives, for any vector type. NaN stays NaN; infinities behave as in torch.
#pragma once

#include "common/activations.h"

namespace {

using igva::Activation;

// erfc(t) / 2 for t >= 0. In fp32 it is exp(log(erfc(t) e^(t^2)) - t^2) / 2, where the logarithm is a polynomial in t up
// to 4.25 and constant beyond, where erfc is below 2e-9. tools/fit_polynomials.py finds the coefficients. Up to t = 3
// the relative error is below 8e-7, and a GELU made of it is within 2.6e-8 of the exact one.
template <class V>
inline V half_erfc(V t) {
  const V s = if_le(t, V::set(4.25f), t, V::set(4.25f));
  V p = V::set(-8.03039995e-07f);
  p = fma(p, s, V::set(1.56018305e-05f));
  p = fma(p, s, V::set(-0.000132364308f));
  p = fma(p, s, V::set(0.000624596491f));
  p = fma(p, s, V::set(-0.00157191348f));
  p = fma(p, s, V::set(-1.77416496e-05f));
  p = fma(p, s, V::set(0.0193102974f));
  p = fma(p, s, V::set(-0.102848098f));
  p = fma(p, s, V::set(0.363395095f));
  p = fma(p, s, V::set(-1.12838018f));
  return V::set(0.5f) * exp(fma(V::set(0.0f) - t, t, p * s));
}

#ifdef IGVA_SCALAR
inline Lane<double> half_erfc(Lane<double> t) { return {0.5 * std::erfc(t.v)}; }
#endif

template <class V>
inline V normal_cdf(V x) {
  const V q = half_erfc(abs(x) * V::set(typename V::Scalar(0.70710678118654752440)));
  return if_le(x, V::set(0), q, V::set(1) - q);
}

// sigmoid(x), and its derivative without cancellation.
template <class V>
struct Sigmoid {
  V value;
  V slope;
};

template <class V>
inline Sigmoid<V> sigmoid(V x) {
  const V e = exp(V::set(0) - abs(x));
  const V inverse = V::set(1) / (V::set(1) + e);
  const V small = e * inverse;
  return {if_le(x, V::set(0), small, inverse), small * inverse};
}

// gelu_tanh(x) = x * sigmoid(2 * inner(x)), inner(x) = sqrt(2 / pi) * (x + 0.044715 x^3).
template <class V>
inline V twice_inner(V x) {
  return x * fma(x * x, V::set(typename V::Scalar(0.07135481627260025)), V::set(typename V::Scalar(1.5957691216057308)));
}

template <class V>
struct ValueAndGrad {
  V value;
  V grad;
};

// For each activation: act(x), and act(x) with grad * act'(x).
template <Activation activation>
struct Formula {
  static_assert(activation == Activation::none, "this activation of IGVA_ACTIVATIONS has no formula for the CPU");
  template <class V>
  static V value(V x) { return x; }
  template <class V>
  static ValueAndGrad<V> value_and_grad(V x, V grad) { return {x, grad}; }
};

template <>
struct Formula<Activation::gelu> {
  template <class V>
  static V value(V x) { return x * normal_cdf(x); }
  template <class V>
  static ValueAndGrad<V> value_and_grad(V x, V grad) {
    using S = typename V::Scalar;
    const V cdf = normal_cdf(x);
    const V density = V::set(S(0.39894228040143267794)) * exp(V::set(S(-0.5)) * x * x);
    return {x * cdf, grad * fma(x, density, cdf)};
  }
};

template <>
struct Formula<Activation::gelu_tanh> {
  template <class V>
  static V value(V x) { return x * sigmoid(twice_inner(x)).value; }
  template <class V>
  static ValueAndGrad<V> value_and_grad(V x, V grad) {
    using S = typename V::Scalar;
    const Sigmoid<V> s = sigmoid(twice_inner(x));
    const V slope = fma(x * x, V::set(S(0.21406444881780076)), V::set(S(1.5957691216057308)));
    // Where x^2 overflows, the sigmoid has long been flat.
    return {x * s.value, grad * (s.value + if_le(s.slope, V::set(0), V::set(0), x * s.slope * slope))};
  }
};

template <>
struct Formula<Activation::relu> {
  template <class V>
  static V value(V x) { return if_le(x, V::set(0), V::set(0), x); }
  template <class V>
  static ValueAndGrad<V> value_and_grad(V x, V grad) { return {value(x), if_le(x, V::set(0), V::set(0), grad)}; }
};

template <>
struct Formula<Activation::silu> {
  template <class V>
  static V value(V x) { return x * sigmoid(x).value; }
  template <class V>
  static ValueAndGrad<V> value_and_grad(V x, V grad) {
    const Sigmoid<V> s = sigmoid(x);
    return {x * s.value, grad * fma(x, s.slope, s.value)};
  }
};

// Calls f with the formula of an activation.
template <class F>
inline void dispatch_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::none: return f(Formula<Activation::none>());
#define IGVA_CASE(name) \
  case Activation::name: return f(Formula<Activation::name>());
    IGVA_ACTIVATIONS(IGVA_CASE)
#undef IGVA_CASE
  }
}

} // namespace
