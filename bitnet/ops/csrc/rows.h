// One thread's share of a multiplication: up to ROWS_AT_ONCE rows of weights against all tokens, tile by tile.
//
// A tier provides
//     TOKENS     rows of inputs that share what is decoded of a weight
//     ROWS       rows of weights that share what is loaded of an input
//     template <int L, int R, int M> static void tile(task, n, m, dots, step)
//                the sums of R rows of weights from n on with M tokens from m on, to dots[token * step + row]
#pragma once
#include "results.h"

template <class Tier, int L, int M> INLINE void tiles_of_tokens(const Task &t, const Epilogue &e, int64_t m) {
  int32_t dots[M * ROWS_AT_ONCE];
  constexpr int R = Tier::ROWS;
  int64_t i = 0;
  for (; i + R <= e.count; i += R) Tier::template tile<L, R, M>(t, e.from + i, m, dots + i, ROWS_AT_ONCE);
  for (; i < e.count; ++i) Tier::template tile<L, 1, M>(t, e.from + i, m, dots + i, ROWS_AT_ONCE);
  for (int k = 0; k < M; ++k) Tier::finish(e, dots + k * ROWS_AT_ONCE, t, m + k);
}

template <class Tier, int L> INLINE void share_in(const Task &t, int64_t from, int64_t count) {
  Epilogue e;
  prepare(e, t, from, count);
  int64_t m = 0;
  for (; m + Tier::TOKENS <= t.tokens; m += Tier::TOKENS) tiles_of_tokens<Tier, L, Tier::TOKENS>(t, e, m);
  if (m + 4 <= t.tokens) tiles_of_tokens<Tier, L, 4>(t, e, m), m += 4;
  if (m + 2 <= t.tokens) tiles_of_tokens<Tier, L, 2>(t, e, m), m += 2;
  if (m < t.tokens) tiles_of_tokens<Tier, L, 1>(t, e, m);
}

template <class Tier> INLINE void share_of(const Task &t, int64_t from, int64_t count) {
  if (t.layout == I2) share_in<Tier, I2>(t, from, count);
  else if (t.layout == T5) share_in<Tier, T5>(t, from, count);
  else share_in<Tier, B1>(t, from, count);
}
