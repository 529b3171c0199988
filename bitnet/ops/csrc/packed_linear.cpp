// Packed ternary and sign weights times quantized inputs, on a CPU: one translation unit with a plain C interface.
//
//     task.h      the bytes, drawn                   scalar.h, avx2.h, avx512.h, amx.h, neon.h     the tiers
//     inputs.h    float -> int8 codes, one scale     rows.h      tiles of rows and tokens, one thread's share
//     floats.h    bfloat16, float16                  results.h   int32 sums -> rescaled, biased, rounded
//
// Every tier gives the same integers, and the float operations around them are the same code: results are equal bit
// for bit, on every machine, for every number of threads.
#include <cstdlib>

#include "scalar.h"
#if defined(__x86_64__)
#include "amx.h"
#include "avx2.h"
#include "avx512.h"
#include "cpu_x86.h"
#elif defined(__aarch64__)
#include "neon.h"
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Tier { SCALAR = 0, AVX2 = 1, AVX512 = 2, AMX = 3, NEON = 4, TIERS = 5 };
enum Outcome { DONE = 0, OUT_OF_MEMORY = 1, NO_SUCH_TIER = 2 };

constexpr int AMX_FROM = 12;  // tokens: with fewer, most of a tile would be padding

// Whether this machine can run a tier, and this library holds it.
EXPORT int bitnet_has_tier(int tier) {
#if defined(__x86_64__)
  static const bool avx2 = has_avx2(), avx512 = has_avx512(), amx = avx512 && has_amx();  // once: cpuid may trap
  if (tier == AVX2) return avx2;
  if (tier == AVX512) return avx512;
  if (tier == AMX) return amx;
#elif defined(__aarch64__)
  static const bool dot_product = has_dot_product();
  if (tier == NEON) return dot_product;
#endif
  return tier == SCALAR;
}

EXPORT int bitnet_is_parallel() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

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

// y = rescaled (quantized x) (codes of packed)^T + bias; see bitnet/ops/packed_linear.py for what each argument is.
// x is [tokens, columns] with x_step elements from row to row; x and y have the type `type`.
EXPORT int bitnet_packed_linear(
    const void *x, int64_t tokens, int64_t columns, int64_t x_step, int type, float steps,
    const uint8_t *packed, int64_t rows, int64_t row_bytes, int layout,
    const float *scale, int64_t scale_step, const void *bias, int bias_type,
    void *y, int threads, int tier) {
  if (!bitnet_has_tier(tier)) return NO_SUCH_TIER;
  if (!tokens || !rows) return DONE;
  if (tier == AMX && tokens < AMX_FROM) tier = AVX512;
  const int planes = layout == I2 ? PLANES<I2> : layout == T5 ? PLANES<T5> : PLANES<B1>;
  const int64_t blocks = (row_bytes + BLOCK - 1) / BLOCK, step = blocks * BLOCK * planes;
  const int64_t padded = (tokens + 15) / 16 * 16;  // AMX takes 16 at a time
  // One allocation: scales and sums, then codes. All sizes are multiples of 64 bytes.
  char *memory = (char *)aligned_alloc(64, (size_t)(padded * (8 + step)));
  if (!memory) return OUT_OF_MEMORY;
  int8_t *inputs = (int8_t *)memory + padded * 8;
  if (tier == AMX) memset(inputs + (padded - 16) * step, 0, (size_t)(16 * step));  // rows that do not exist
  const Source source = {x, type, x_step, columns, steps};
  const Task t = {packed, rows, row_bytes, blocks, layout, scale, scale_step, bias, bias_type, tokens,
                  inputs, step, (float *)memory, (int32_t *)memory + padded, y, type};
#if defined(__x86_64__)
  if (tier == AMX) run<Amx>(source, t, threads);
  else if (tier == AVX512) run<Avx512>(source, t, threads);
  else if (tier == AVX2) run<Avx2>(source, t, threads);
#elif defined(__aarch64__)
  if (tier == NEON) run<Neon>(source, t, threads);
#endif
  if (tier == SCALAR) run<Scalar>(source, t, threads);
  free(memory);
  return DONE;
}

// Whether a byte of the middle of a row is one that codes pack to: i2 has no code 3, t5 no byte above 242.
template <int L> INLINE bool is_code(uint8_t byte) {
  return L == I2 ? !(byte & byte >> 1 & 0x55) : L == T5 ? byte <= 242 : true;
}

// The offset of the first byte that no codes pack to, or -1. `limit`: what the last byte of a row is below, because it
// holds zeros beyond the last column.
template <int L> static int64_t damaged_byte(const uint8_t *packed, int64_t rows, int64_t row_bytes, int limit) {
  for (int64_t n = 0; n < rows; ++n, packed += row_bytes) {
    uint8_t bad = packed[row_bytes - 1] >= limit;
    for (int64_t j = 0; j < row_bytes; ++j) bad |= !is_code<L>(packed[j]);  // without a branch: vectors of them
    for (int64_t j = 0; bad && j < row_bytes; ++j)
      if (!is_code<L>(packed[j]) || (j == row_bytes - 1 && packed[j] >= limit)) return n * row_bytes + j;
  }
  return -1;
}

EXPORT int64_t bitnet_damaged_byte(
    const uint8_t *packed, int64_t rows, int64_t row_bytes, int64_t columns, int layout) {
  const int base = layout == I2 ? 4 : layout == T5 ? 3 : 2, planes = layout == I2 ? 4 : layout == T5 ? 5 : 8;
  int limit = 1;
  for (int64_t i = (row_bytes - 1) * planes; i < columns; ++i) limit *= base;
  if (layout == I2) return damaged_byte<I2>(packed, rows, row_bytes, limit);
  if (layout == T5) return damaged_byte<T5>(packed, rows, row_bytes, limit);
  return damaged_byte<B1>(packed, rows, row_bytes, limit);
}
