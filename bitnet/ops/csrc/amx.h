// AMX: 16 x 16 int32 results a tile, 16 x 64 codes times 64 x 16 inputs at once. For many tokens; few go to avx512.h.
//
// Weights are the left operand: 64 columns of 16 rows, as they come out of the bytes, plane by plane. Inputs are the
// right one, which wants four neighbouring columns of 16 tokens in a line of 64 bytes; they are quantized into that
// order:
//
//     inputs of 16 tokens    [block][plane][16 groups of 4 columns][16 tokens][4 columns]   1024 bytes a block, plane
//
// A share is 64 rows: 32 at a time, decoded SLAB blocks at a time (in the first cache) against all tokens of a group.
#pragma once
#include "avx512.h"

#ifdef BITNET_EMULATE
#define AMX_TARGET AVX512_TARGET
#else
#define AMX_TARGET AVX512_TARGET ",amx-tile,amx-int8"
#endif
#define AMX_FN __attribute__((target(AMX_TARGET), noinline)) static
#define AMX_INLINE __attribute__((target(AMX_TARGET), always_inline)) static inline

struct InTiles {
  INLINE void put(const Task &t, int64_t m, int64_t b, const int8_t *codes, int count) {
    int8_t *to = t.inputs + (m & ~15) * t.input_step + b * count * 16 + (m & 15) * 4;
    for (int i = 0; i < count / 4; ++i) memcpy(to + 64 * i, codes + 4 * i, 4);
  }
};

struct Amx {
  static constexpr int TILE = 1024, ROWS = 32, TOKENS = 256;
  template <int L> static constexpr int SLAB = 16 / PLANES<L>;  // blocks; 2 * 16 tiles of weights are 32 KiB

  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  struct alignas(64) Scratch {
    uint8_t codes[2][16 * TILE];                // of 2 x 16 rows: one slab
    int32_t sums[TOKENS / 16][2][16][16];       // [16 tokens][16 rows] row by row
    int32_t turned[16][ROWS];                   // of 16 tokens, token by token
  };

  // Codes of 16 rows from n on, blocks [b, b + count): one tile a block and plane. Rows that do not exist are zeros.
  template <int L> AMX_INLINE void decode_rows(const Task &t, int64_t n, int64_t b, int64_t count, uint8_t *to) {
    const RowEnd end = row_end(t);
    for (int64_t i = 0; i < count; ++i)
      for (int r = 0; r < 16; ++r) {
        uint8_t copy[BLOCK];
        __m512i v = _mm512_setzero_si512();
        if (n + r < t.rows) {
          const uint8_t *at = t.packed + (n + r) * t.row_bytes + (b + i) * BLOCK;
          v = Avx512::prepare_bytes<L>(Avx512::load(b + i < end.whole ? at : last_block(t, n + r, end, copy)));
        }
#pragma GCC unroll 8
        for (int p = 0; p < PLANES<L>; ++p)
          _mm512_store_si512(to + (i * PLANES<L> + p) * TILE + r * 64, Avx512::decode<L>(v));
      }
  }

  // sums += codes [2 x 16 rows] times inputs of 16 or 32 tokens, over `count` tiles.
  template <bool TWO>
  AMX_INLINE void multiply(
      const Scratch &s, const int8_t *x, int64_t x_step, int64_t count, int32_t (*sums)[2][16][16]) {
    _tile_loadd(0, sums[0][0], 64);
    _tile_loadd(1, sums[0][1], 64);
    if (TWO) _tile_loadd(2, sums[1][0], 64);
    if (TWO) _tile_loadd(3, sums[1][1], 64);
    for (int64_t i = 0; i < count; ++i) {
      _tile_loadd(4, s.codes[0] + i * TILE, 64);
      _tile_loadd(5, s.codes[1] + i * TILE, 64);
      _tile_loadd(6, x + i * TILE, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 5, 6);
      if (TWO) _tile_loadd(7, x + x_step + i * TILE, 64);
      if (TWO) _tile_dpbusd(2, 4, 7);
      if (TWO) _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    if (TWO) _tile_stored(2, sums[1][0], 64);
    if (TWO) _tile_stored(3, sums[1][1], 64);
  }

  // 16 x 16 numbers, rows to columns: pairs, fours, then quarters of a vector change places.
  AMX_INLINE void turn(const int32_t (*from)[16], int32_t (*to)[ROWS]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(from[i]);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
        a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
      }
    for (int j = 0; j < 4; ++j) {  // a[4 q + j] holds, in quarter c, column 4 c + j of rows 4 q .. 4 q + 3
      const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
      const __m512i even2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
      const __m512i odd2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
      _mm512_store_si512(to[j], _mm512_shuffle_i32x4(even, even2, 0x88));
      _mm512_store_si512(to[8 + j], _mm512_shuffle_i32x4(even, even2, 0xdd));
      _mm512_store_si512(to[4 + j], _mm512_shuffle_i32x4(odd, odd2, 0x88));
      _mm512_store_si512(to[12 + j], _mm512_shuffle_i32x4(odd, odd2, 0xdd));
    }
  }

  // Rows [e.from, e.from + e.count), at most 32, of tokens [m, m + tokens).
  template <int L> AMX_INLINE void panel(Scratch &s, const Epilogue &e, const Task &t, int64_t m, int64_t tokens) {
    const int64_t tiles = (tokens + 15) / 16, x_step = 16 * t.input_step;
    memset(s.sums, 0, sizeof s.sums[0] * (size_t)tiles);
    for (int64_t b = 0; b < t.blocks; b += SLAB<L>) {
      const int64_t count = t.blocks - b < SLAB<L> ? t.blocks - b : SLAB<L>;
      decode_rows<L>(t, e.from, b, count, s.codes[0]);
      decode_rows<L>(t, e.from + 16, b, count, s.codes[1]);
      const int8_t *x = t.inputs + m * t.input_step + b * PLANES<L> * TILE;
      int64_t i = 0;
      for (; i + 2 <= tiles; i += 2) multiply<true>(s, x + i * x_step, x_step, count * PLANES<L>, s.sums + i);
      if (i < tiles) multiply<false>(s, x + i * x_step, x_step, count * PLANES<L>, s.sums + i);
    }
    for (int64_t i = 0; i < tiles; ++i) {
      turn(s.sums[i][0], s.turned);
      turn(s.sums[i][1], (int32_t (*)[ROWS])(s.turned[0] + 16));
      for (int64_t k = 0; k < 16 && 16 * i + k < tokens; ++k) Avx512::finish(e, s.turned[k], t, m + 16 * i + k);
    }
  }

  template <int L> AMX_INLINE void share_in(const Task &t, int64_t from, int64_t count) {
    Scratch s;
    Config config;
    _tile_loadconfig(&config);
    for (int64_t n = 0; n < count; n += ROWS) {
      Epilogue e;
      prepare(e, t, from + n, count - n < ROWS ? count - n : ROWS);
      for (int64_t m = 0; m < t.tokens; m += TOKENS)
        panel<L>(s, e, t, m, t.tokens - m < TOKENS ? t.tokens - m : TOKENS);
    }
    _tile_release();
  }

  AMX_FN void quantize_input(const Source &s, const Task &t, int64_t m) { quantize<InTiles>(s, t, m); }
  AMX_FN void share(const Task &t, int64_t share) {
    const int64_t from = share * ROWS_AT_ONCE, left = t.rows - from, count = left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE;
    if (t.layout == I2) share_in<I2>(t, from, count);
    else if (t.layout == T5) share_in<T5>(t, from, count);
    else share_in<B1>(t, from, count);
  }
};
