// Eight floats at once, in the vectors of whatever instruction set a function is compiled for: the same bits in all.
//
// A sum of many numbers is taken in 16 lanes, in this order, whatever the tier:
//
//     lane l = (x[l] + x[l + 16]) + x[l + 32] ...        then l + (l + 8), + 4, + 2, + 1
#pragma once
#include "floats.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // all of it is inlined: nothing is passed to a function

typedef float Lanes __attribute__((vector_size(32)));
typedef int32_t IntLanes __attribute__((vector_size(32)));
constexpr int LANES = 8;

INLINE Lanes all(float value) { return Lanes{value, value, value, value, value, value, value, value}; }

// Up to eight numbers from p, `left` of which exist; zeros for the others.
INLINE Lanes load_lanes(const float *p, int64_t left) {
  Lanes v = {};
  if (left >= LANES) memcpy(&v, p, sizeof v);
  else if (left > 0) memcpy(&v, p, sizeof(float) * (size_t)left);
  return v;
}
INLINE void store_lanes(const Lanes &v, float *p, int64_t left) {
  if (left >= LANES) memcpy(p, &v, sizeof v);
  else if (left > 0) memcpy(p, &v, sizeof(float) * (size_t)left);
}

INLINE float sum_of_lanes(const Lanes &low, const Lanes &high) {
  const Lanes v = low + high;
  const float a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
  return (a + c) + (b + d);
}

// y[r] = w[r] . x of R rows at once, `count` numbers each.
template <int R> INLINE void dot_rows(const float *const *w, const float *x, int64_t count, float *y) {
  Lanes low[R] = {}, high[R] = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) {
    const Lanes x0 = load_lanes(x + i, LANES), x1 = load_lanes(x + i + LANES, LANES);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      low[r] += load_lanes(w[r] + i, LANES) * x0;
      high[r] += load_lanes(w[r] + i + LANES, LANES) * x1;
    }
  }
  if (i < count)
    for (int r = 0; r < R; ++r) {
      low[r] += load_lanes(w[r] + i, count - i) * load_lanes(x + i, count - i);
      high[r] += load_lanes(w[r] + i + LANES, count - i - LANES) * load_lanes(x + i + LANES, count - i - LANES);
    }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) y[r] = sum_of_lanes(low[r], high[r]);
}

INLINE float dot(const float *a, const float *b, int64_t count) {
  float y;
  dot_rows<1>(&a, b, count, &y);
  return y;
}

// e^x within 2 units of the last place; NaN of a NaN. Beyond +-87 it is that of +-87.
INLINE Lanes exp_of(Lanes x) {
  x = x < -87.0f ? all(-87.0f) : x;
  x = x > 87.0f ? all(87.0f) : x;
  const Lanes shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;  // 1.5 * 2^23: rounds
  const Lanes r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;                  // ln 2 in two parts
  Lanes p = all(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  IntLanes bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;
  Lanes power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}
