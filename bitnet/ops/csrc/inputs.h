// Quantization of inputs: int8, one scale a row, to the bit like absmax and absmax_b1 of bitnet/quant/absmax.py.
#pragma once
#include "floats.h"

// `count` numbers of any type as float, from x + from on.
INLINE void read(const void *x, int type, int64_t from, int count, float *out) {
  if (type == F32) memcpy(out, (const float *)x + from, sizeof(float) * (size_t)count);
  else if (type == BF16) for (int i = 0; i < count; ++i) out[i] = to_float(((const bf16 *)x)[from + i]);
  else for (int i = 0; i < count; ++i) out[i] = to_float(((const f16 *)x)[from + i]);
}

// The bits of the largest magnitude, of a NaN if there is one: magnitudes compare like their bits, and NaN is above
// all.
INLINE uint32_t largest_of(const void *x, int type, int64_t from, int64_t columns) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < columns; k += 512) {
    const int count = columns - k < 512 ? (int)(columns - k) : 512;
    float values[512];
    read(x, type, from + k, count, values);
    for (int i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(values[i]) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
  }
  return largest;
}

// Codes of up to BLOCK * PLANES inputs in the order of task.h; zeros where there are none. Returns their sum.
template <int L> INLINE int32_t quantize_block(const float *x, int count, float scale, int8_t *codes) {
  int8_t in_order[BLOCK * PLANES<L>] = {};
  int32_t sum = 0;
  for (int i = 0; i < count; ++i) {
    // A true division: multiplying by the reciprocal gives other codes. Adding 1.5 * 2^23 rounds half to even, and
    // leaves the integer in the low bits; the quotient is at most 128 here.
    const int32_t code = (int32_t)bits_of(x[i] / scale + 12582912.0f) - 0x4b400000;
    const int32_t clamped = code > 127 ? 127 : code < -127 ? -127 : code;
    in_order[i] = (int8_t)clamped;
    sum += clamped;
  }
  for (int column = 0; column < PLANES<L>; ++column)
    for (int j = 0; j < BLOCK; ++j) codes[plane_of<L>(column) * BLOCK + j] = in_order[j * PLANES<L> + column];
  return sum;
}

// Where the inputs come from: [tokens, columns] with `step` numbers from row to row. `steps` is 127 for absmax, 128 for
// absmax_b1.
struct Source {
  const void *x;
  int type;
  int64_t step, columns;
  float steps;
};

// Where the codes of a block go: row after row, as drawn in task.h.
struct InRows {
  INLINE void put(const Task &t, int64_t m, int64_t b, const int8_t *codes, int count) {
    memcpy(t.inputs + m * t.input_step + b * count, codes, (size_t)count);
  }
};

template <class Order, int L> INLINE void quantize_as(const Source &s, const Task &t, int64_t m) {
  constexpr int COUNT = BLOCK * PLANES<L>;
  const uint32_t largest = largest_of(s.x, s.type, m * s.step, s.columns), eps = bits_of(1e-5f);
  const float scale = float_of(largest < eps ? eps : largest) / s.steps;
  const bool finite = largest < 0x7f800000;  // else no code means anything, and 0 * NaN is NaN, as it has to be
  int8_t codes[COUNT] = {};
  int32_t sum = 0;
  for (int64_t b = 0; b < t.blocks; ++b) {
    if (finite) {
      const int count = s.columns - b * COUNT < COUNT ? (int)(s.columns - b * COUNT) : COUNT;
      float values[COUNT];
      read(s.x, s.type, m * s.step + b * COUNT, count, values);
      sum += quantize_block<L>(values, count, scale, codes);
    }
    Order::put(t, m, b, codes, COUNT);
  }
  t.input_scale[m] = finite ? scale : float_of(0x7fc00000);
  t.input_sum[m] = sum;
}

template <class Order> INLINE void quantize(const Source &s, const Task &t, int64_t m) {
  if (t.layout == I2) quantize_as<Order, I2>(s, t, m);
  else if (t.layout == T5) quantize_as<Order, T5>(s, t, m);
  else quantize_as<Order, B1>(s, t, m);
}
