// What a multiplication is made of: packed weights, quantized inputs, a row of results; and the order of their bytes.
//
// The stored bytes of bitnet/quant/packing.py are read as they are: there is no second copy of any weight. A byte holds
// the codes of PLANES neighbouring columns,
//
//     i2   byte j = columns 4j .. 4j+3, 2 bits each               plane p = column 4j + p
//     b1   byte j = columns 8j .. 8j+7, 1 bit each                plane p = column 8j + p
//     t5   byte j = columns 5j .. 5j+4, digits in base 3          plane p = column 5j + 4 - p  (highest digit first)
//
// so a vector of bytes, shifted and masked, holds one plane of many neighbouring bytes. The inputs are quantized into
// the order that this asks for: block b stands against the 64 weight bytes from 64 b on,
//
//     weights, one row      [ 64 bytes                                   ][ 64 bytes ...
//     inputs, one row       [ plane 0: 64 codes ][ plane 1: 64 codes ]...[ plane 0 of the next block ...
//
// Columns that do not exist have the input 0. So whatever a kernel reads beside a row's last byte (the next row, or
// zeros) adds nothing.
//
// A kernel computes  dot = sum over columns of code * input  with codes 0, 1, 2 (or bits 0, 1). In units of weights,
//     ternary: t = code - 1        sum t * input = dot - sum of inputs
//     signs:   t = 2 * bit - 1     sum t * input = 2 * dot - sum of inputs
// All of it is int32: |sum t * input| <= 127 * 131072 < 2^24, the longest row that the operator hands over.
#pragma once
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

enum Layout { I2 = 0, T5 = 1, B1 = 2 };
enum Type { F32 = 0, BF16 = 1, F16 = 2 };

constexpr int BLOCK = 64;         // weight bytes that one block of inputs stands against
constexpr int ROWS_AT_ONCE = 64;  // rows of weights that one thread takes at a time

template <int L> constexpr int PLANES = L == I2 ? 4 : L == T5 ? 5 : 8;
template <int L> constexpr int BITS = L == I2 ? 2 : 1;                     // of a code; t5 has no whole number of them
template <int L> constexpr int MASK = L == I2 ? 3 : 1;
template <int L> constexpr int LARGEST = L == B1 ? 1 : 2;                  // code
template <int L> constexpr int plane_of(int column) { return L == T5 ? 4 - column : column; }

struct Task {
  const uint8_t *packed;  // [rows, row_bytes]
  int64_t rows, row_bytes, blocks;
  int layout;
  const float *scale;     // [rows], or one
  int64_t scale_step;     // 1, or 0
  const void *bias;       // [rows] or null
  int bias_type;
  int64_t tokens;         // rows of inputs
  int8_t *inputs;         // [tokens, blocks * BLOCK * planes]
  int64_t input_step;
  float *input_scale;     // [tokens]
  int32_t *input_sum;     // [tokens]
  void *y;                // [tokens, rows]
  int y_type;
};

// The whole blocks of a row, and where its last, shorter one can be read.
struct RowEnd {
  int64_t whole;  // blocks
  int left;       // bytes in the last block, 0 if there is none
};
INLINE RowEnd row_end(const Task &t) { return {t.row_bytes / BLOCK, (int)(t.row_bytes % BLOCK)}; }

// The shorter last block of row n: in place where 64 bytes can be read (zero inputs stand against what follows the
// row), else a copy. Only the last rows of a matrix need one.
INLINE const uint8_t *last_block(const Task &t, int64_t n, const RowEnd &end, uint8_t *copy) {
  const int64_t from = n * t.row_bytes + end.whole * BLOCK;
  if (from + BLOCK <= t.rows * t.row_bytes) return t.packed + from;
  memset(copy, 0, BLOCK);
  memcpy(copy, t.packed + from, end.left);
  return copy;
}
