// How rows and tokens are cut up: shares for threads, tiles for registers.
//
// A tier provides
//     TOKENS     rows of inputs that share what is decoded of a weight
//     ROWS       rows of weights that share what is loaded of an input
//     STREAMS    the same with one token, where rows come from distant places
//     template <int L, int R, int M> static void tile(task, rows, m, sums)
//                the sums of R rows of weights with M tokens from m on
//
// Many tokens: a share is ROWS_AT_ONCE rows on end, which stay in a cache while all tokens pass.
//
// One token: weights come from memory once, and the time is that of reading them. A processor fetches ahead in several
// places better than in one (26 against 14 GB/s on an AMD Zen 3 core), so the matrix is cut into STRIPS, and a share is
// DEPTH rows of each:
//
//     strip 0  [ share 0 ][ share 1 ][ share 2 ] ...      the order within a share: row 0 of strips 0 and 1, row 0 of
//     strip 1  [ share 0 ][ share 1 ][ share 2 ] ...      strips 2 and 3, row 1 of strips 0 and 1, ...
//     strip 2  [ share 0 ][ share 1 ][ share 2 ] ...
//     strip 3  [ share 0 ][ share 1 ] (shorter, if the rows end here)
#pragma once
#include "results.h"

constexpr int STRIPS = 4, DEPTH = ROWS_AT_ONCE / STRIPS;

struct Rows {
  int64_t first, gap;  // rows first, first + gap, ...
};
struct Sums {
  int32_t *to;
  int64_t token_step, row_step;
};

INLINE int64_t strip_rows(const Task &t) { return ((t.rows + STRIPS - 1) / STRIPS + DEPTH - 1) / DEPTH * DEPTH; }
INLINE int64_t shares_of(const Task &t) {
  return t.tokens == 1 ? strip_rows(t) / DEPTH : (t.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
}

template <class Tier, int L> INLINE void share_of_strips(const Task &t, int64_t share) {
  constexpr int R = Tier::STREAMS;
  const int64_t strip = strip_rows(t), from = share * DEPTH;
  int32_t dots[STRIPS * DEPTH];
  for (int i = 0; i < DEPTH; ++i)
    for (int s = 0; s < STRIPS; s += R) {
      const int64_t n = s * strip + from + i;
      const Sums sums = {dots + s * DEPTH + i, 0, DEPTH};
      if (n + (R - 1) * strip < t.rows) Tier::template tile<L, R, 1>(t, {n, strip}, 0, sums);
      else
        for (int r = 0; r < R && n + r * strip < t.rows; ++r)
          Tier::template tile<L, 1, 1>(t, {n + r * strip, 0}, 0, {sums.to + r * DEPTH, 0, 0});
    }
  for (int s = 0; s < STRIPS; ++s) {
    const int64_t first = s * strip + from, left = t.rows - first;
    if (left <= 0) break;
    Epilogue e;
    prepare(e, t, first, left < DEPTH ? left : DEPTH);
    Tier::finish(e, dots + s * DEPTH, t, 0);
  }
}

template <class Tier, int L, int M> INLINE void tiles_of_tokens(const Task &t, const Epilogue &e, int64_t m) {
  constexpr int R = Tier::ROWS;
  int32_t dots[M * ROWS_AT_ONCE];
  int64_t i = 0;
  for (; i + R <= e.count; i += R) Tier::template tile<L, R, M>(t, {e.from + i, 1}, m, {dots + i, ROWS_AT_ONCE, 1});
  for (; i < e.count; ++i) Tier::template tile<L, 1, M>(t, {e.from + i, 1}, m, {dots + i, ROWS_AT_ONCE, 1});
  for (int k = 0; k < M; ++k) Tier::finish(e, dots + k * ROWS_AT_ONCE, t, m + k);
}

template <class Tier, int L> INLINE void share_in(const Task &t, int64_t share) {
  if (t.tokens == 1) return share_of_strips<Tier, L>(t, share);
  const int64_t from = share * ROWS_AT_ONCE, left = t.rows - from;
  Epilogue e;
  prepare(e, t, from, left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE);
  int64_t m = 0;
  for (; m + Tier::TOKENS <= t.tokens; m += Tier::TOKENS) tiles_of_tokens<Tier, L, Tier::TOKENS>(t, e, m);
  if (m + 4 <= t.tokens) tiles_of_tokens<Tier, L, 4>(t, e, m), m += 4;
  if (m + 2 <= t.tokens) tiles_of_tokens<Tier, L, 2>(t, e, m), m += 2;
  if (m < t.tokens) tiles_of_tokens<Tier, L, 1>(t, e, m);
}

template <class Tier> INLINE void share_of(const Task &t, int64_t share) {
  if (t.layout == I2) share_in<Tier, I2>(t, share);
  else if (t.layout == T5) share_in<Tier, T5>(t, share);
  else share_in<Tier, B1>(t, share);
}
