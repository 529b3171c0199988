// One packed layer times quantized inputs, by the tier that is asked for.
#pragma once
#include <cstdlib>

#include "scalar.h"
#if defined(__x86_64__)
#include "amx.h"
#include "avx2.h"
#include "avx512.h"
#elif defined(__aarch64__)
#include "neon.h"
#endif

enum Tier { SCALAR = 0, AVX2 = 1, AVX512 = 2, AMX = 3, NEON = 4, TIERS = 5 };

constexpr int64_t PARALLEL_FROM = 1 << 18;  // products: waking a second thread takes as long as 0.2 million of them
constexpr int AMX_FROM = 12;  // tokens: with fewer, most of a tile would be padding

// As bitnet/ops/native.py lays it out.
struct Linear {
  const uint8_t *packed;
  const float *scale;
  const void *bias;
  int64_t rows, columns, row_bytes, scale_step;
  int layout, bias_type;
  float steps;  // of the inputs: 127 or 128
};

template <class Tier>
static void run(const Source &source, const Task &t, int threads) {
  const int64_t shares = shares_of(t);
  // Several shares on end for a thread: the processor fetches beyond a share's end, and should not do so in vain.
  const int64_t on_end = t.tokens > 1 || shares < 8 * threads ? 1 : shares / (4 * threads);
  (void)on_end;  // without OpenMP
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for
    for (int64_t m = 0; m < t.tokens; ++m) Tier::quantize_input(source, t, m);
#pragma omp for schedule(dynamic, on_end)
    for (int64_t share = 0; share < shares; ++share) Tier::share(t, share);
  }
}

static int planes_of(int layout) { return layout == I2 ? PLANES<I2> : layout == T5 ? PLANES<T5> : PLANES<B1>; }
static int64_t input_step_of(const Linear &l) {
  return (l.row_bytes + BLOCK - 1) / BLOCK * BLOCK * planes_of(l.layout);
}
static int64_t padded_tokens(int64_t tokens) { return (tokens + 15) / 16 * 16; }  // AMX takes 16 at a time

// Bytes that `multiply` works in, to be aligned to 64: scales and sums, then codes; all are multiples of 64.
static int64_t memory_for(const Linear &l, int64_t tokens) { return padded_tokens(tokens) * (8 + input_step_of(l)); }

// y [tokens, rows] of x [tokens, columns], both of the type `type`.
static void multiply(
    const Linear &l, const void *x, int64_t tokens, int64_t x_step, int type, void *y, char *memory, int threads,
    int tier) {
  if (tier == AMX && tokens < AMX_FROM) tier = AVX512;
  const int64_t step = input_step_of(l), padded = padded_tokens(tokens);
  int8_t *inputs = (int8_t *)memory + padded * 8;
  if (tier == AMX) memset(inputs + (padded - 16) * step, 0, (size_t)(16 * step));  // rows that do not exist
  const Source source = {x, type, x_step, l.columns, l.steps};
  const Task t = {l.packed, l.rows, l.row_bytes, (l.row_bytes + BLOCK - 1) / BLOCK, l.layout, l.scale, l.scale_step,
                  l.bias, l.bias_type, tokens, inputs, step, (float *)memory, (int32_t *)memory + padded, y, type};
#if defined(__x86_64__)
  if (tier == AMX) run<Amx>(source, t, threads);
  else if (tier == AVX512) run<Avx512>(source, t, threads);
  else if (tier == AVX2) run<Avx2>(source, t, threads);
#elif defined(__aarch64__)
  if (tier == NEON) run<Neon>(source, t, threads);
#endif
  if (tier == SCALAR) run<Scalar>(source, t, threads);
}

// work(i) compiled for the instruction set of a tier.
template <class Work> static void in_tier(int tier, const Work &work, int64_t i) {
#if defined(__x86_64__)
  if (tier == AMX || tier == AVX512) return Avx512::with(work, i);
  if (tier == AVX2) return Avx2::with(work, i);
#elif defined(__aarch64__)
  if (tier == NEON) return Neon::with(work, i);
#endif
  Scalar::with(work, i);
}
