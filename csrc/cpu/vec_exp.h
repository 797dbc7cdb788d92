// e^x in fp32 to about 1 ulp: x = n ln2 + r, |r| <= ln2 / 2, and e^r = 1 + r + r^2 p(r). tools/fit_polynomials.py finds
// the coefficients of p. ln2 is split so that its first part times n is exact.
#pragma once

namespace {

template <class V>
inline V exp(V x) {
  x = clamp(x, -150.0f, 150.0f); // beyond them fp32 has only 0 and infinity
  const V n = round(x * V::set(1.44269504f));
  V r = fma(n, V::set(-0.693359375f), x);
  r = fma(n, V::set(2.12194440e-4f), r);
  V p = V::set(0.00138146023f);
  p = fma(p, r, V::set(0.00836871564f));
  p = fma(p, r, V::set(0.041668389f));
  p = fma(p, r, V::set(0.166665211f));
  p = fma(p, r, V::set(0.49999994f));
  p = fma(p, r * r, r + V::set(1.0f));
  return scale_by_power(p, n);
}

} // namespace
