// The intrinsics of AVX-512 and AMX that the kernels use, in plain C++: the same kernel source then runs where the
// processor has none of them. Written from the instructions' definitions, lane by lane.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

struct emulated512 {
  uint8_t b[64];
};

template <class T> static T emu_lane(const emulated512 &v, int i) {
  T x;
  memcpy(&x, v.b + i * sizeof(T), sizeof(T));
  return x;
}
template <class T> static void emu_set(emulated512 &v, int i, T x) { memcpy(v.b + i * sizeof(T), &x, sizeof(T)); }
template <class T, class F> static emulated512 emu_each(F f) {
  emulated512 out;
  for (int i = 0; i < (int)(64 / sizeof(T)); ++i) emu_set<T>(out, i, (T)f(i));
  return out;
}
template <class T, class F> static emulated512 emu_map(const emulated512 &a, const emulated512 &b, F f) {
  return emu_each<T>([&](int i) { return f(emu_lane<T>(a, i), emu_lane<T>(b, i)); });
}

#define EMU static inline __attribute__((unused))
EMU emulated512 emu_loadu(const void *from) { emulated512 v; memcpy(v.b, from, 64); return v; }
EMU emulated512 emu_load(const void *from) { if ((uintptr_t)from % 64) abort(); return emu_loadu(from); }
EMU void emu_store(void *to, emulated512 v) { if ((uintptr_t)to % 64) abort(); memcpy(to, v.b, 64); }
EMU emulated512 emu_zero() { return emulated512{}; }
EMU emulated512 emu_set1_epi8(char x) { return emu_each<int8_t>([=](int) { return x; }); }
EMU emulated512 emu_set1_epi16(short x) { return emu_each<int16_t>([=](int) { return x; }); }
EMU emulated512 emu_and(emulated512 a, emulated512 b) {
  return emu_map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x & y; });
}
EMU emulated512 emu_or(emulated512 a, emulated512 b) {
  return emu_map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x | y; });
}
EMU emulated512 emu_slli16(emulated512 a, int n) {
  return emu_each<uint16_t>([&](int i) { return emu_lane<uint16_t>(a, i) << n; });
}
EMU emulated512 emu_srli16(emulated512 a, int n) {
  return emu_each<uint16_t>([&](int i) { return emu_lane<uint16_t>(a, i) >> n; });
}
EMU emulated512 emu_srai32(emulated512 a, int n) {
  return emu_each<int32_t>([&](int i) { return emu_lane<int32_t>(a, i) >> n; });
}
EMU emulated512 emu_mulhi16(emulated512 a, emulated512 b) {
  return emu_map<uint16_t>(a, b, [](uint32_t x, uint32_t y) { return x * y >> 16; });
}
EMU emulated512 emu_add8(emulated512 a, emulated512 b) {
  return emu_map<uint8_t>(a, b, [](int x, int y) { return x + y; });
}
EMU emulated512 emu_add32(emulated512 a, emulated512 b) {
  return emu_map<int32_t>(a, b, [](int32_t x, int32_t y) { return x + y; });
}
EMU emulated512 emu_subs8(emulated512 a, emulated512 b) {
  return emu_map<uint8_t>(a, b, [](int x, int y) { return x > y ? x - y : 0; });
}
EMU emulated512 emu_min8(emulated512 a, emulated512 b) {
  return emu_map<uint8_t>(a, b, [](int x, int y) { return x < y ? x : y; });
}
EMU emulated512 emu_dpbusd(emulated512 c, emulated512 a, emulated512 b) {
  return emu_each<int32_t>([&](int i) {
    int32_t sum = emu_lane<int32_t>(c, i);
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += (int32_t)a.b[j] * (int8_t)b.b[j];
    return sum;
  });
}
EMU int emu_reduce(emulated512 a) {
  int sum = 0;
  for (int i = 0; i < 16; ++i) sum += emu_lane<int32_t>(a, i);
  return sum;
}
template <class T> static emulated512 emu_unpack(const emulated512 &a, const emulated512 &b, int high) {
  const int half = 8 / (int)sizeof(T);  // of the numbers in a quarter
  return emu_each<T>([&](int i) {
    const int quarter = i / (2 * half), at = quarter * 2 * half + high * half + i % (2 * half) / 2;
    return emu_lane<T>(i % 2 ? b : a, at);
  });
}
EMU emulated512 emu_shuffle(emulated512 a, emulated512 b, int which) {
  emulated512 out;
  for (int i = 0; i < 4; ++i) memcpy(out.b + 16 * i, (i < 2 ? a : b).b + 16 * (which >> (2 * i) & 3), 16);
  return out;
}

static thread_local uint8_t emu_tiles[8][16][64];
static thread_local bool emu_configured;
EMU void emu_loadconfig(const void *from) {
  const uint8_t *c = (const uint8_t *)from;
  for (int i = 0; i < 8; ++i)
    if (c[0] != 1 || c[16 + 2 * i] != 64 || c[17 + 2 * i] || c[48 + i] != 16) abort();
  emu_configured = true;
}
EMU void emu_release() { emu_configured = false; }
EMU void emu_tile_load(int tile, const void *from, int64_t step) {
  if (!emu_configured) abort();
  for (int r = 0; r < 16; ++r) memcpy(emu_tiles[tile][r], (const uint8_t *)from + r * step, 64);
}
EMU void emu_tile_store(int tile, void *to, int64_t step) {
  for (int r = 0; r < 16; ++r) memcpy((uint8_t *)to + r * step, emu_tiles[tile][r], 64);
}
EMU void emu_tile_dpbusd(int c, int a, int b) {
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      memcpy(&sum, emu_tiles[c][r] + 4 * n, 4);
      for (int k = 0; k < 64; ++k) sum += (int32_t)emu_tiles[a][r][k] * (int8_t)emu_tiles[b][k / 4][4 * n + k % 4];
      memcpy(emu_tiles[c][r] + 4 * n, &sum, 4);
    }
}

#undef _mm512_slli_epi16
#undef _mm512_srli_epi16
#undef _mm512_srai_epi32
#undef _mm512_shuffle_i32x4
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define __m512i emulated512
#define _mm512_loadu_si512 emu_loadu
#define _mm512_load_si512 emu_load
#define _mm512_store_si512 emu_store
#define _mm512_setzero_si512 emu_zero
#define _mm512_set1_epi8 emu_set1_epi8
#define _mm512_set1_epi16 emu_set1_epi16
#define _mm512_and_si512 emu_and
#define _mm512_or_si512 emu_or
#define _mm512_slli_epi16 emu_slli16
#define _mm512_srli_epi16 emu_srli16
#define _mm512_srai_epi32 emu_srai32
#define _mm512_mulhi_epu16 emu_mulhi16
#define _mm512_add_epi8 emu_add8
#define _mm512_add_epi32 emu_add32
#define _mm512_subs_epu8 emu_subs8
#define _mm512_min_epu8 emu_min8
#define _mm512_dpbusd_epi32 emu_dpbusd
#define _mm512_reduce_add_epi32 emu_reduce
#define _mm512_unpacklo_epi32(a, b) emu_unpack<uint32_t>(a, b, 0)
#define _mm512_unpackhi_epi32(a, b) emu_unpack<uint32_t>(a, b, 1)
#define _mm512_unpacklo_epi64(a, b) emu_unpack<uint64_t>(a, b, 0)
#define _mm512_unpackhi_epi64(a, b) emu_unpack<uint64_t>(a, b, 1)
#define _mm512_shuffle_i32x4 emu_shuffle
#define _tile_loadconfig emu_loadconfig
#define _tile_release emu_release
#define _tile_loadd emu_tile_load
#define _tile_stored emu_tile_store
#define _tile_dpbusd emu_tile_dpbusd
