// Eight floats: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "cpu/storage.h"

namespace {

struct Avx2 {
  using Scalar = float;
  static constexpr int width = 8;
  // A product holds this many rows by two vectors of its result in registers, which leaves 4 of the 16 for operands.
  static constexpr int product_rows = 6;
  __m256 v;

  static Avx2 set(float x) { return {_mm256_set1_ps(x)}; }
  static Avx2 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Avx2 load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Avx2 load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const { _mm_storeu_si128((__m128i*)p, to_bf16x8()); }
  void store(f16* p) const { _mm_storeu_si128((__m128i*)p, to_f16x8()); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void stream(bf16* p) const { _mm_stream_si128((__m128i*)p, to_bf16x8()); }
  void stream(f16* p) const { _mm_stream_si128((__m128i*)p, to_f16x8()); }
  float sum() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

 private:
  __m128i to_f16x8() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  __m128i to_bf16x8() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i wide = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  }
};

inline Avx2 operator+(Avx2 a, Avx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Avx2 operator-(Avx2 a, Avx2 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Avx2 operator*(Avx2 a, Avx2 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Avx2 operator/(Avx2 a, Avx2 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Avx2 fma(Avx2 a, Avx2 b, Avx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Avx2 abs(Avx2 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Avx2 if_le(Avx2 x, Avx2 y, Avx2 a, Avx2 b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LE_OQ))};
}
// The constants are the first operands, so that a NaN passes through.
inline Avx2 clamp(Avx2 x, float low, float high) {
  return {_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x.v))};
}
inline Avx2 round(Avx2 x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x * 2^n for whole n in [-252, 252], in two steps so that the result may be subnormal, zero or infinite.
inline Avx2 scale_by_power(Avx2 x, Avx2 n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
}

inline void stream_fence() { _mm_sfence(); }

// Eight rows of eight lanes become eight columns.
inline void transpose(Avx2 (&rows)[8]) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int half = 0; half < 8; half += 4) {
    for (int i = 0; i < 2; ++i) {
      quads[half + 2 * i] = _mm256_shuffle_ps(pairs[half + i], pairs[half + i + 2], 0x44);
      quads[half + 2 * i + 1] = _mm256_shuffle_ps(pairs[half + i], pairs[half + i + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

} // namespace

#include "cpu/vec_exp.h"
