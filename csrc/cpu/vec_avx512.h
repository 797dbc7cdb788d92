// Sixteen floats: AVX-512 F, BW, VL and DQ.
#pragma once

#include <immintrin.h>

#include "cpu/vec_avx2.h" // transposes, and what does not depend on the width of a vector

namespace {

struct Avx512 {
  using Scalar = float;
  static constexpr int width = 16;
  static constexpr int product_rows = 12; // 24 of the 32 registers hold a tile of the result, see Avx2
  __m512 v;

  static Avx512 set(float x) { return {_mm512_set1_ps(x)}; }
  static Avx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Avx512 load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Avx512 load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256((__m256i*)p, to_bf16x16()); }
  void store(f16* p) const { _mm256_storeu_si256((__m256i*)p, to_f16x16()); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void stream(bf16* p) const { _mm256_stream_si256((__m256i*)p, to_bf16x16()); }
  void stream(f16* p) const { _mm256_stream_si256((__m256i*)p, to_f16x16()); }
  float sum() const { return _mm512_reduce_add_ps(v); }

 private:
  __m256i to_f16x16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  // Not vcvtneps2bf16: that instruction flushes subnormals, and few machines with AVX-512 have it.
  __m256i to_bf16x16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }
};

inline Avx512 operator+(Avx512 a, Avx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Avx512 operator-(Avx512 a, Avx512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Avx512 operator*(Avx512 a, Avx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Avx512 operator/(Avx512 a, Avx512 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Avx512 fma(Avx512 a, Avx512 b, Avx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Avx512 abs(Avx512 a) { return {_mm512_abs_ps(a.v)}; }
inline Avx512 if_le(Avx512 x, Avx512 y, Avx512 a, Avx512 b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LE_OQ), b.v, a.v)};
}
// The constants are the first operands, so that a NaN passes through.
inline Avx512 clamp(Avx512 x, float low, float high) {
  return {_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x.v))};
}
inline Avx512 round(Avx512 x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Avx512 scale_by_power(Avx512 x, Avx512 n) { return {_mm512_scalef_ps(x.v, n.v)}; }

} // namespace
