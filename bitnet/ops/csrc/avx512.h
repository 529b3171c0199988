// AVX-512 with VNNI: vpdpbusd multiplies unsigned codes by signed inputs and adds four neighbours into int32.
#pragma once
#include "rows.h"
#include "x86.h"

#ifdef BITNET_EMULATE
#define AVX512_TARGET "avx2"
#else
#define AVX512_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#endif
#define AVX512_FN __attribute__((target(AVX512_TARGET), noinline)) static
#define AVX512_INLINE __attribute__((target(AVX512_TARGET), always_inline)) static inline

struct Avx512 {
  // Eight sums at once hide the latency of vpdpbusd, and its inputs come from memory without an instruction of their
  // own.
  static constexpr int ROWS = 1, TOKENS = 8, STREAMS = 2;
  static constexpr int PREFETCH = 1024;  // bytes

  AVX512_INLINE __m512i load(const void *from) { return _mm512_loadu_si512(from); }

  // As in avx2.h; bytes compare unsigned here, by saturated subtraction.
  template <int L> AVX512_INLINE __m512i prepare_bytes(__m512i v) {
    if (L != T5) return v;
    const __m512i up = _mm512_set1_epi16(242), by = _mm512_set1_epi16((short)34522);
    const __m512i even = _mm512_srli_epi16(_mm512_mulhi_epu16(_mm512_or_si512(_mm512_slli_epi16(v, 8), up), by), 7);
    const __m512i high = _mm512_and_si512(v, _mm512_set1_epi16((short)0xff00));
    const __m512i odd = _mm512_srli_epi16(_mm512_mulhi_epu16(_mm512_or_si512(high, up), by), 7);
    return _mm512_or_si512(even, _mm512_slli_epi16(odd, 8));
  }

  template <int L> AVX512_INLINE __m512i decode(__m512i &v) {
    if (L == T5) {
      const __m512i unit = _mm512_set1_epi8(1);
      const __m512i one = _mm512_min_epu8(_mm512_subs_epu8(v, _mm512_set1_epi8(85)), unit);
      const __m512i two = _mm512_min_epu8(_mm512_subs_epu8(v, _mm512_set1_epi8((char)170)), unit);
      v = _mm512_add_epi8(v, _mm512_add_epi8(v, v));
      return _mm512_add_epi8(one, two);
    }
    const __m512i codes = _mm512_and_si512(v, _mm512_set1_epi8(MASK<L>));
    v = _mm512_srli_epi16(v, BITS<L>);
    return codes;
  }

  // acc[r][k] += row r of weights times token k, over `blocks` blocks.
  template <int L, int R, int M>
  AVX512_INLINE void add(
      __m512i (&acc)[R][M], const uint8_t *const *w, const int8_t *x, int64_t x_step, int64_t blocks) {
    for (int64_t b = 0; b < blocks; ++b, x += BLOCK * PLANES<L>) {
      __m512i v[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) v[r] = prepare_bytes<L>(load(w[r] + b * BLOCK));
#pragma GCC unroll 8
      for (int p = 0; p < PLANES<L>; ++p) {
        __m512i codes[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) codes[r] = decode<L>(v[r]);
#pragma GCC unroll 8
        for (int k = 0; k < M; ++k) {
          const __m512i inputs = load(x + k * x_step + p * BLOCK);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[r][k] = _mm512_dpbusd_epi32(acc[r][k], codes[r], inputs);
        }
      }
    }
  }

  // The same for one token, without shifts: codes stay where they stand in their byte, and plane p is summed up times
  // 2^(BITS p). Bytes are unsigned: the highest plane fits, and int32 holds 128 * 127 * 131072 / 4 four times over.
  template <int L, int R>
  AVX512_INLINE void add_one(__m512i (&acc)[R][1], const uint8_t *const *w, const int8_t *x, int64_t blocks) {
    __m512i sums[R][PLANES<L>];
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < PLANES<L>; ++p) sums[r][p] = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; ++b, x += BLOCK * PLANES<L>)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        _mm_prefetch((const char *)(w[r] + b * BLOCK + PREFETCH), _MM_HINT_T0);
        const __m512i v = load(w[r] + b * BLOCK);
#pragma GCC unroll 8
        for (int p = 0; p < PLANES<L>; ++p) {
          const __m512i codes = _mm512_and_si512(v, _mm512_set1_epi8((char)(MASK<L> << (BITS<L> * p))));
          sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], codes, load(x + p * BLOCK));
        }
      }
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < PLANES<L>; ++p)
        acc[r][0] = _mm512_add_epi32(acc[r][0], _mm512_srai_epi32(sums[r][p], BITS<L> * p));
  }

  template <int L, int R, int M>
  AVX512_INLINE void add_blocks(
      __m512i (&acc)[R][M], const uint8_t *const *w, const int8_t *x, int64_t x_step, int64_t blocks) {
    if constexpr (M == 1 && L != T5) add_one<L, R>(acc, w, x, blocks);
    else add<L, R, M>(acc, w, x, x_step, blocks);
  }

  template <int L, int R, int M>
  AVX512_FN void tile(const Task &t, Rows rows, int64_t m, Sums sums) {
    const RowEnd end = row_end(t);
    const int8_t *x = t.inputs + m * t.input_step;
    const uint8_t *w[R];
    __m512i acc[R][M];
    for (int r = 0; r < R; ++r) {
      w[r] = t.packed + (rows.first + r * rows.gap) * t.row_bytes;
      for (int k = 0; k < M; ++k) acc[r][k] = _mm512_setzero_si512();
    }
    add_blocks<L, R, M>(acc, w, x, t.input_step, end.whole);
    if (end.left) {
      uint8_t copies[R][BLOCK];
      for (int r = 0; r < R; ++r) w[r] = last_block(t, rows.first + r * rows.gap, end, copies[r]);
      add_blocks<L, R, M>(acc, w, x + end.whole * BLOCK * PLANES<L>, t.input_step, 1);
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < M; ++k) sums.to[k * sums.token_step + r * sums.row_step] = _mm512_reduce_add_epi32(acc[r][k]);
  }

  AVX512_FN void quantize_input(const Source &s, const Task &t, int64_t m) { quantize<InRows>(s, t, m); }
  AVX512_FN void finish(const Epilogue &e, const int32_t *dots, const Task &t, int64_t m) { finish_row(e, dots, t, m); }
  AVX512_FN void share(const Task &t, int64_t share) { share_of<Avx512>(t, share); }
  template <class Work> AVX512_FN void with(const Work &work, int64_t i) { work(i); }
};
