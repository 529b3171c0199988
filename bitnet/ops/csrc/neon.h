// NEON with the dot product instructions (Armv8.2): sdot multiplies four neighbouring codes and inputs into int32.
#pragma once
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "rows.h"

#define NEON_FN __attribute__((target("arch=armv8.2-a+dotprod"), noinline)) static
#define NEON_INLINE __attribute__((target("arch=armv8.2-a+dotprod"), always_inline)) static inline

static bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return true;  // every processor that Apple makes since 2017
#endif
}

struct Neon {
  static constexpr int ROWS = 4, TOKENS = 4, STREAMS = 4;

  // As in avx2.h; f - 128 is not needed, bytes compare unsigned here.
  template <int L> NEON_INLINE uint8x16_t prepare_bytes(uint8x16_t v) {
    if (L != T5) return v;
    const uint16x8_t up = vdupq_n_u16(242);
    const uint16x8_t low = vaddq_u16(vshll_n_u8(vget_low_u8(v), 8), up);
    const uint16x8_t high = vaddq_u16(vshll_n_u8(vget_high_u8(v), 8), up);
    return vcombine_u8(fraction(low), fraction(high));
  }

  // v * 34522 / 2^23: the division by 243 of avx2.h.
  NEON_INLINE uint8x8_t fraction(uint16x8_t v) {
    const uint16x4_t low = vshrn_n_u32(vmull_n_u16(vget_low_u16(v), 34522), 16);
    const uint16x4_t high = vshrn_n_u32(vmull_n_u16(vget_high_u16(v), 34522), 16);
    return vmovn_u16(vshrq_n_u16(vcombine_u16(low, high), 7));
  }

  template <int L> NEON_INLINE int8x16_t decode(uint8x16_t &v) {
    if (L == T5) {
      const uint8x16_t one = vcgtq_u8(v, vdupq_n_u8(85)), two = vcgtq_u8(v, vdupq_n_u8(170));
      v = vmulq_u8(v, vdupq_n_u8(3));
      return vnegq_s8(vreinterpretq_s8_u8(vaddq_u8(one, two)));
    }
    const int8x16_t codes = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(MASK<L>)));
    v = vshrq_n_u8(v, BITS<L>);
    return codes;
  }

  // acc[r][k] += row r of weights times token k, over `blocks` blocks.
  template <int L, int R, int M>
  NEON_INLINE void add(
      int32x4_t (&acc)[R][M], const uint8_t *const *w, const int8_t *x, int64_t x_step, int64_t blocks) {
    for (int64_t b = 0; b < blocks; ++b, x += BLOCK * PLANES<L>)
      for (int part = 0; part < BLOCK; part += 16) {
        uint8x16_t v[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) v[r] = prepare_bytes<L>(vld1q_u8(w[r] + b * BLOCK + part));
#pragma GCC unroll 8
        for (int p = 0; p < PLANES<L>; ++p) {
          int8x16_t codes[R];
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) codes[r] = decode<L>(v[r]);
#pragma GCC unroll 4
          for (int k = 0; k < M; ++k) {
            const int8x16_t inputs = vld1q_s8(x + k * x_step + p * BLOCK + part);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r][k] = vdotq_s32(acc[r][k], codes[r], inputs);
          }
        }
      }
  }

  template <int L, int R, int M>
  NEON_FN void tile(const Task &t, Rows rows, int64_t m, Sums sums) {
    const RowEnd end = row_end(t);
    const int8_t *x = t.inputs + m * t.input_step;
    const uint8_t *w[R];
    int32x4_t acc[R][M];
    for (int r = 0; r < R; ++r) {
      w[r] = t.packed + (rows.first + r * rows.gap) * t.row_bytes;
      for (int k = 0; k < M; ++k) acc[r][k] = vdupq_n_s32(0);
    }
    add<L, R, M>(acc, w, x, t.input_step, end.whole);
    if (end.left) {
      uint8_t copies[R][BLOCK];
      for (int r = 0; r < R; ++r) w[r] = last_block(t, rows.first + r * rows.gap, end, copies[r]);
      add<L, R, M>(acc, w, x + end.whole * BLOCK * PLANES<L>, t.input_step, 1);
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < M; ++k) sums.to[k * sums.token_step + r * sums.row_step] = vaddvq_s32(acc[r][k]);
  }

  NEON_FN void quantize_input(const Source &s, const Task &t, int64_t m) { quantize<InRows>(s, t, m); }
  NEON_FN void finish(const Epilogue &e, const int32_t *dots, const Task &t, int64_t m) { finish_row(e, dots, t, m); }
  NEON_FN void share(const Task &t, int64_t share) { share_of<Neon>(t, share); }
  template <class Work> NEON_FN void with(const Work &work, int64_t i) { work(i); }
};
