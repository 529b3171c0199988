// AVX2: vpmaddubsw multiplies codes by inputs and adds neighbours into int16, which is widened before it can overflow.
#pragma once
#include "rows.h"
#include "x86.h"

#define AVX2_FN __attribute__((target("avx2,fma"), noinline)) static
#define AVX2_INLINE __attribute__((target("avx2,fma"), always_inline)) static inline

struct Avx2 {
  // With many tokens one row at a time: inputs are then operands in memory, and need no instruction of their own (89
  // billion products a second on an AMD Zen 3, with two rows 80). PREFETCH, in bytes, is for one token; measured from
  // 0 to 8192.
  static constexpr int ROWS = 1, TOKENS = 4, STREAMS = 2;
  static constexpr int PREFETCH = 1024;

  // Blocks whose products int16 holds: a lane takes two planes' pairs a block and plane, each at most 2 * LARGEST *
  // 127.
  template <int L> static constexpr int BLOCKS_IN_16_BITS = 32767 / (2 * PLANES<L> * 2 * LARGEST<L> * 127);

  AVX2_INLINE __m256i load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }

  // Bytes as they are stored -> what `decode` takes planes of.
  template <int L> AVX2_INLINE __m256i prepare_bytes(__m256i v) {
    if (L != T5) return v;
    // Five digits in base 3 as a fraction: f = ceil(256 v / 243). Then the highest digit is floor(3 f / 256) and the
    // rest 3 f mod 256. The division by 243 is a multiplication by 34522 / 2^23, exact for all 243 bytes. Kept as f -
    // 128, because bytes compare as signed numbers here; 3 (f - 128) = 3 f - 128 modulo 256, so the offset stays.
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
    for (int64_t begin = 0; begin < blocks; begin += BLOCKS_IN_16_BITS<L>) {
      const int64_t stop = begin + BLOCKS_IN_16_BITS<L> < blocks ? begin + BLOCKS_IN_16_BITS<L> : blocks;
      __m256i sums[R][M];
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < M; ++k) sums[r][k] = _mm256_setzero_si256();
      for (int64_t b = begin; b < stop; ++b)
#pragma GCC unroll 2
        for (int half = 0; half < BLOCK; half += 32) {
          const int8_t *xs = x + b * BLOCK * PLANES<L> + half;
          __m256i v[R];
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) v[r] = prepare_bytes<L>(load(w[r] + b * BLOCK + half));
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
        for (int k = 0; k < M; ++k)
          acc[r][k] = _mm256_add_epi32(acc[r][k], _mm256_madd_epi16(sums[r][k], _mm256_set1_epi16(1)));
    }
  }

  // The same for one token, where decoding is not shared: shifts are saved by leaving codes where they stand in their
  // half byte. Group g sums up the planes g and g + GROUPS, times 2^(BITS g): at most 8 * 127 * 2 a pair, so int16
  // holds four blocks.
  template <int L, int R>
  AVX2_INLINE void add_one(__m256i (&acc)[R][1], const uint8_t *const *w, const int8_t *x, int64_t blocks) {
    constexpr int GROUPS = 4 / BITS<L>, AT_ONCE = 4;
    for (int64_t begin = 0; begin < blocks; begin += AT_ONCE) {
      const int64_t stop = begin + AT_ONCE < blocks ? begin + AT_ONCE : blocks;
      __m256i sums[R][GROUPS];
      for (int r = 0; r < R; ++r)
        for (int g = 0; g < GROUPS; ++g) sums[r][g] = _mm256_setzero_si256();
      for (int64_t b = begin; b < stop; ++b) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) _mm_prefetch((const char *)(w[r] + b * BLOCK + PREFETCH), _MM_HINT_T0);
#pragma GCC unroll 2
        for (int half = 0; half < BLOCK; half += 32) {
          const int8_t *xs = x + b * BLOCK * PLANES<L> + half;
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const __m256i low = load(w[r] + b * BLOCK + half), high = _mm256_srli_epi16(low, 4);
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; ++g) {
              const __m256i mask = _mm256_set1_epi8(MASK<L> << (BITS<L> * g));
              const __m256i one = _mm256_maddubs_epi16(_mm256_and_si256(low, mask), load(xs + g * BLOCK));
              const __m256i two = _mm256_maddubs_epi16(_mm256_and_si256(high, mask), load(xs + (g + GROUPS) * BLOCK));
              sums[r][g] = _mm256_add_epi16(sums[r][g], _mm256_add_epi16(one, two));
            }
          }
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int g = 1; g < GROUPS; ++g)
          sums[r][0] = _mm256_add_epi16(sums[r][0], _mm256_srai_epi16(sums[r][g], BITS<L> * g));
        acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(sums[r][0], _mm256_set1_epi16(1)));
      }
    }
  }

  template <int L, int R, int M>
  AVX2_INLINE void add_blocks(
      __m256i (&acc)[R][M], const uint8_t *const *w, const int8_t *x, int64_t x_step, int64_t n) {
    if constexpr (M == 1 && L != T5) add_one<L, R>(acc, w, x, n);
    else add<L, R, M>(acc, w, x, x_step, n);
  }

  AVX2_INLINE int32_t sum_of(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }

  template <int L, int R, int M>
  AVX2_FN void tile(const Task &t, Rows rows, int64_t m, Sums sums) {
    const RowEnd end = row_end(t);
    const int8_t *x = t.inputs + m * t.input_step;
    const uint8_t *w[R];
    __m256i acc[R][M];
    for (int r = 0; r < R; ++r) {
      w[r] = t.packed + (rows.first + r * rows.gap) * t.row_bytes;
      for (int k = 0; k < M; ++k) acc[r][k] = _mm256_setzero_si256();
    }
    add_blocks<L, R, M>(acc, w, x, t.input_step, end.whole);
    if (end.left) {
      uint8_t copies[R][BLOCK];
      for (int r = 0; r < R; ++r) w[r] = last_block(t, rows.first + r * rows.gap, end, copies[r]);
      add_blocks<L, R, M>(acc, w, x + end.whole * BLOCK * PLANES<L>, t.input_step, 1);
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < M; ++k) sums.to[k * sums.token_step + r * sums.row_step] = sum_of(acc[r][k]);
  }

  AVX2_FN void quantize_input(const Source &s, const Task &t, int64_t m) { quantize<InRows>(s, t, m); }
  AVX2_FN void finish(const Epilogue &e, const int32_t *dots, const Task &t, int64_t m) { finish_row(e, dots, t, m); }
  AVX2_FN void share(const Task &t, int64_t share) { share_of<Avx2>(t, share); }
  template <class Work> AVX2_FN void with(const Work &work, int64_t i) { work(i); }
};
