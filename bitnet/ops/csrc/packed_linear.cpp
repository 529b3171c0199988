// Packed ternary and sign weights times quantized inputs, on a CPU: one translation unit with a plain C interface.
//
//     task.h      the bytes, drawn                   scalar.h, avx2.h, avx512.h, amx.h, neon.h     the tiers
//     inputs.h    float -> int8 codes, one scale     rows.h      tiles of rows and tokens, one thread's share
//     floats.h    bfloat16, float16                  results.h   int32 sums -> rescaled, biased, rounded
//     products.h  one layer, by a tier               decoder.h   one token through a model's layers (lanes.h: floats)
//
// Every tier gives the same integers, and the float operations around them are the same code: results are equal bit
// for bit, on every machine, for every number of threads.
#include "decoder.h"
#if defined(__x86_64__)
#include "cpu_x86.h"
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Outcome { DONE = 0, OUT_OF_MEMORY = 1, NO_SUCH_TIER = 2 };

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

// y [tokens, rows] = rescaled (quantized x [tokens, columns]) (codes)^T + bias; see bitnet/ops/packed_linear.py. x and y
// have the type `type`.
EXPORT int bitnet_linear(const Linear *l, const void *x, int64_t tokens, int type, void *y, int threads, int tier) {
  if (!bitnet_has_tier(tier)) return NO_SUCH_TIER;
  if (!tokens || !l->rows) return DONE;
  char *memory = (char *)aligned_alloc(64, (size_t)memory_for(*l, tokens));
  if (!memory) return OUT_OF_MEMORY;
  multiply(*l, x, tokens, l->columns, type, y, memory, threads, tier);
  free(memory);
  return DONE;
}

// One token through a decoder: see decoder.h. Its keys and values are written to `position` of every layer's.
EXPORT int bitnet_decode(
    const Decoder *decoder, float *x, const float *cos, const float *sin, int64_t position, float *y, int threads,
    int tier) {
  if (!bitnet_has_tier(tier)) return NO_SUCH_TIER;
  return decode(*decoder, x, cos, sin, position, y, threads, tier) ? DONE : OUT_OF_MEMORY;
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
