// bfloat16 and float16, rounded half to even like PyTorch rounds. Without branches, so that compilers vectorize them.
#pragma once
#include "task.h"

INLINE uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
INLINE float float_of(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

INLINE float to_float(float value) { return value; }
INLINE float to_float(bf16 value) { return float_of((uint32_t)value.bits << 16); }
INLINE float to_float(f16 value) {
  const uint32_t sign = (uint32_t)(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  const uint32_t subnormal = bits_of((float)(int32_t)magnitude * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);  // inf, NaN : + 112
  return float_of(sign | (magnitude < 0x400 ? subnormal : normal));
}

INLINE void store(float value, float *to) { *to = value; }
INLINE void store(float value, bf16 *to) {
  const uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
INLINE void store(float value, f16 *to) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, a = bits & 0x7fffffff;
  const uint32_t subnormal = bits_of(float_of(a < 0x38800000 ? a : 0) + 0.5f) - 0x3f000000;  // 0.5 has steps of 2^-24
  const uint32_t normal = (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13;
  const uint32_t finite = a < 0x38800000 ? subnormal : a < 0x477ff000 ? normal : 0x7c00;     // 65520 rounds to infinity
  to->bits = (uint16_t)(sign | (a > 0x7f800000 ? 0x7e00 : finite));
}
