// e^x in fp32 to about 1 ulp: x = n ln2 + r, |r| <= ln2 / 2, and a polynomial for e^r. The constants are those of
// Cephes' expf.
#pragma once

namespace {

template <class V>
inline V exp(V x) {
  x = clamp(x, -150.0f, 150.0f); // beyond them fp32 has only 0 and infinity
  const V n = round(x * V::set(1.44269504f));
  V r = fma(n, V::set(-0.693359375f), x);
  r = fma(n, V::set(2.12194440e-4f), r);
  V p = V::set(1.9875691500e-4f);
  p = fma(p, r, V::set(1.3981999507e-3f));
  p = fma(p, r, V::set(8.3334519073e-3f));
  p = fma(p, r, V::set(4.1665795894e-2f));
  p = fma(p, r, V::set(1.6666665459e-1f));
  p = fma(p, r, V::set(5.0000001201e-1f));
  p = fma(p, r * r, r + V::set(1.0f));
  return scale_by_power(p, n);
}

} // namespace
