// Plain C++: every machine has it, and the others must equal it.
#pragma once
#include "rows.h"

struct Scalar {
  static constexpr int ROWS = 1, TOKENS = 4, STREAMS = 1;

  template <int L> static int code(uint8_t byte, int plane) {
    if (L != T5) return byte >> (BITS<L> * plane) & MASK<L>;
    for (int p = plane; p < 4; ++p) byte /= 3;
    return byte % 3;
  }

  template <int L>
  __attribute__((noinline)) static int32_t add(int32_t sum, const uint8_t *bytes, int count, const int8_t *x) {
    for (int p = 0; p < PLANES<L>; ++p)
      for (int j = 0; j < count; ++j) sum += code<L>(bytes[j], p) * x[p * BLOCK + j];
    return sum;
  }

  template <int L, int R, int M> static void tile(const Task &t, Rows rows, int64_t m, Sums sums) {
    const RowEnd end = row_end(t);
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < M; ++k) {
        const uint8_t *row = t.packed + (rows.first + r * rows.gap) * t.row_bytes;
        const int8_t *x = t.inputs + (m + k) * t.input_step;
        int32_t sum = 0;
        for (int64_t b = 0; b < end.whole; ++b) sum = add<L>(sum, row + b * BLOCK, BLOCK, x + b * BLOCK * PLANES<L>);
        sum = add<L>(sum, row + end.whole * BLOCK, end.left, x + end.whole * BLOCK * PLANES<L>);
        sums.to[k * sums.token_step + r * sums.row_step] = sum;
      }
  }

  static void quantize_input(const Source &s, const Task &t, int64_t m) { quantize<InRows>(s, t, m); }
  static void finish(const Epilogue &e, const int32_t *dots, const Task &t, int64_t m) { finish_row(e, dots, t, m); }
  static void share(const Task &t, int64_t share) { share_of<Scalar>(t, share); }
  template <class Work> __attribute__((noinline)) static void with(const Work &work, int64_t i) { work(i); }
};
