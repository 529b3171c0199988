// From integer sums to results: rescale, add the bias, round once. The order of operations is that of
// bitnet/ops/reference.py, and the compiler must not contract them (-ffp-contract=off).
#pragma once
#include "inputs.h"

// What multiplies and what is added to rows [from, from + count), made once for all tokens.
struct Epilogue {
  float scale[ROWS_AT_ONCE], bias[ROWS_AT_ONCE];
  int64_t from, count;
};

INLINE void prepare(Epilogue &e, const Task &t, int64_t from, int64_t count) {
  e.from = from;
  e.count = count;
  for (int64_t i = 0; i < count; ++i) e.scale[i] = t.scale[(from + i) * t.scale_step];
  if (t.bias) read(t.bias, t.bias_type, from, (int)count, e.bias);
}

template <class T> INLINE void store_all(const float *values, int64_t count, T *y) {
  for (int64_t i = 0; i < count; ++i) store(values[i], y + i);
}

// dots [count] of token m, into the result.
INLINE void finish_row(const Epilogue &e, const int32_t *dots, const Task &t, int64_t m) {
  const float input_scale = t.input_scale[m];
  const int32_t sum = t.input_sum[m], factor = t.layout == B1 ? 2 : 1;
  float values[ROWS_AT_ONCE];
  for (int64_t i = 0; i < e.count; ++i) values[i] = (float)(dots[i] * factor - sum) * (e.scale[i] * input_scale);
  if (t.bias)
    for (int64_t i = 0; i < e.count; ++i) values[i] += e.bias[i];
  const int64_t at = m * t.rows + e.from;
  if (t.y_type == F32) store_all(values, e.count, (float *)t.y + at);
  else if (t.y_type == BF16) store_all(values, e.count, (bf16 *)t.y + at);
  else store_all(values, e.count, (f16 *)t.y + at);
}
