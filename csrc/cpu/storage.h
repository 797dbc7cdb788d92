// 16-bit floats as storage, and their conversions where no instruction helps.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t rest = uint32_t(x.bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return float_of(sign | rest | 0x7f800000); // inf, NaN
  // The multiplication corrects the exponent and makes subnormals normal.
  return float_of(sign | bits_of(float_of(rest) * 0x1p112f));
}

inline bf16 to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline f16 to_f16(float x) {
  const uint32_t bits = bits_of(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (rest < 0x38800000) { // subnormal: the addition rounds at the right bit
    return {uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)))};
  }
  return {uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
}

} // namespace
