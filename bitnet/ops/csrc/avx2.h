// AVX2: vpmaddubsw multiplies codes by inputs and adds neighbours into int16, which is widened before it can overflow.
#pragma once
#include <immintrin.h>

#include "rows.h"

#define AVX2_FN __attribute__((target("avx2,fma"), noinline)) static
#define AVX2_INLINE __attribute__((target("avx2,fma"), always_inline)) static inline

struct Avx2 {
  template <int M> static constexpr int ROWS = 2;

  // Blocks whose products int16 holds: a lane takes two planes' pairs a block and plane, each at most 2 * LARGEST * 127.
  template <int L> static constexpr int BLOCKS_IN_16_BITS = 32767 / (2 * PLANES<L> * 2 * LARGEST<L> * 127);

  AVX2_INLINE __m256i load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }

  // Bytes as they are stored -> what `decode` takes planes of.
  template <int L> AVX2_INLINE __m256i prepare_bytes(__m256i v) {
    if (L != T5) return v;
    // Five digits in base 3 as a fraction: f = ceil(256 v / 243). Then the highest digit is floor(3 f / 256) and the rest
    // 3 f mod 256. The division by 243 is a multiplication by 34522 / 2^23, exact for all 243 bytes. Kept as f - 128,
    // because bytes compare as signed numbers here; 3 (f - 128) = 3 f - 128 modulo 256, so the offset stays.
    const __m256i up = _mm256_set1_epi16(242), by = _mm256_set1_epi16((short)34522);
    const __m256i even = _mm256_srli_epi16(_mm256_mulhi_epu16(_mm256_or_si256(_mm256_slli_epi16(v, 8), up), by), 7);
    const __m256i high = _mm256_and_si256(v, _mm256_set1_epi16((short)0xff00));
    const __m256i odd = _mm256_srli_epi16(_mm256_mulhi_epu16(_mm256_or_si256(high, up), by), 7);
    return _mm256_xor_si256(_mm256_or_si256(even, _mm256_slli_epi16(odd, 8)), _mm256_set1_epi8((char)0x80));
  }

  // The next plane's codes; v moves on to the one after it.
  template <int L> AVX2_INLINE __m256i decode(__m256i &v) {
    if (L == T5) {
      const __m256i one = _mm256_cmpgt_epi8(v, _mm256_set1_epi8(85 - 128));
      const __m256i two = _mm256_cmpgt_epi8(v, _mm256_set1_epi8(170 - 128));
      v = _mm256_add_epi8(v, _mm256_add_epi8(v, v));
      return _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_add_epi8(one, two));
    }
    const __m256i codes = _mm256_and_si256(v, _mm256_set1_epi8(MASK<L>));
    v = _mm256_srli_epi16(v, BITS<L>);
    return codes;
  }

  // acc[r][k] += row r of weights times token k, over `blocks` blocks.
  template <int L, int R, int M>
  AVX2_INLINE void add(__m256i (&acc)[R][M], const uint8_t *const *w, const int8_t *x, int64_t x_step, int64_t blocks) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t begin = 0; begin < blocks; begin += BLOCKS_IN_16_BITS<L>) {
      const int64_t stop = begin + BLOCKS_IN_16_BITS<L> < blocks ? begin + BLOCKS_IN_16_BITS<L> : blocks;
      __m256i sums[R][M];
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < M; ++k) sums[r][k] = _mm256_setzero_si256();
      for (int64_t i = 2 * begin; i < 2 * stop; ++i) {  // 32 bytes: half a block
        const int8_t *xs = x + (i >> 1) * BLOCK * PLANES<L> + (i & 1) * 32;
        __m256i v[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          v[r] = prepare_bytes<L>(load(w[r] + 32 * i));
          if (M == 1) _mm_prefetch((const char *)(w[r] + 32 * i + 2048), _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int p = 0; p < PLANES<L>; ++p) {
          __m256i codes[R];
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) codes[r] = decode<L>(v[r]);
#pragma GCC unroll 4
          for (int k = 0; k < M; ++k) {
            const __m256i inputs = load(xs + k * x_step + p * BLOCK);
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r)
              sums[r][k] = _mm256_add_epi16(sums[r][k], _mm256_maddubs_epi16(codes[r], inputs));
          }
        }
      }
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < M; ++k) acc[r][k] = _mm256_add_epi32(acc[r][k], _mm256_madd_epi16(sums[r][k], ones));
    }
  }

  AVX2_INLINE int32_t sum_of(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }

  template <int L, int R, int M>
  AVX2_FN void tile(const Task &t, int64_t n, int64_t m, int32_t *dots, int64_t step) {
    const RowEnd end = row_end(t);
    const int8_t *x = t.inputs + m * t.input_step;
    const uint8_t *w[R];
    __m256i acc[R][M];
    for (int r = 0; r < R; ++r) {
      w[r] = t.packed + (n + r) * t.row_bytes;
      for (int k = 0; k < M; ++k) acc[r][k] = _mm256_setzero_si256();
    }
    add<L, R, M>(acc, w, x, t.input_step, end.whole);
    if (end.left) {
      uint8_t copies[R][BLOCK];
      for (int r = 0; r < R; ++r) w[r] = last_block(t, n + r, end, copies[r]);
      add<L, R, M>(acc, w, x + end.whole * BLOCK * PLANES<L>, t.input_step, 1);
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < M; ++k) dots[k * step + r] = sum_of(acc[r][k]);
  }

  AVX2_FN void quantize_input(const Source &s, const Task &t, int64_t m) { quantize(s, t, m); }
  AVX2_FN void finish(const Epilogue &e, const int32_t *dots, const Task &t, int64_t m) { finish_row(e, dots, t, m); }
  AVX2_FN void share(const Task &t, int64_t from, int64_t count) { share_of<Avx2>(t, from, count); }
};
