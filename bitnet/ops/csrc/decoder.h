// One token through the layers of a decoder whose linear layers are packed: one call instead of thirty a layer.
//
//     x += o(norm(attention(qkv(norm(x)))))          norms scale by 1 / root mean square, and may be absent before o
//     x += down(norm(act(gate) * up)) of gate_up(norm(x))                                           and before down
//
// Keys and values lie in the model's own cache. The products of codes are those of packed_linear, to the bit. The rest
// is float32, in the same order in every tier and for every number of threads (lanes.h).
#pragma once
#include <cmath>

#include "lanes.h"
#include "products.h"

enum Activation { SQUARED_RELU = 0, SILU = 1 };

// These three are as bitnet/ops/decoder.py lays them out.
struct Norm {
  const float *weight;  // null: no norm
  double eps;
};
struct Layer {
  Linear qkv, o, gate_up, down;
  Norm norm, o_norm, norm_2, down_norm;
  float *keys, *values;  // [key heads, room, size]
  int64_t room;
};
struct Decoder {
  Layer *layers;
  int64_t count, hidden, inner, heads, key_heads, size;
  Norm norm;
  const float *head;  // [vocabulary, hidden], or null: what the head reads is the result
  const float *head_bias;
  int64_t vocabulary;
  float scaling;
  int activation;
};

struct Normalize {
  const Norm &n;
  const float *x;
  int64_t count;
  float *y;

  __attribute__((always_inline)) inline void operator()(int64_t) const {
    const float scale = (float)(1.0 / std::sqrt((double)dot(x, x, count) / (double)count + n.eps));
    for (int64_t i = 0; i < count; i += LANES) {
      const int64_t left = count - i;
      store_lanes(load_lanes(x + i, left) * scale * load_lanes(n.weight + i, left), y + i, left);
    }
  }
};

struct Add {
  float *x;
  const float *y;
  int64_t count;

  __attribute__((always_inline)) inline void operator()(int64_t) const {
    for (int64_t i = 0; i < count; i += LANES)
      store_lanes(load_lanes(x + i, count - i) + load_lanes(y + i, count - i), x + i, count - i);
  }
};

// y = activation(both[0 .. count)) * both[count .. 2 count)
struct Gate {
  const float *both;
  int64_t count;
  int activation;
  float *y;

  __attribute__((always_inline)) inline void operator()(int64_t) const {
    for (int64_t i = 0; i < count; i += LANES) {
      Lanes gate = load_lanes(both + i, count - i);
      if (activation == SILU) gate = gate / (exp_of(-gate) + 1.0f);
      else gate = gate < 0.0f ? all(0.0f) : gate, gate = gate * gate;  // a NaN stays one
      store_lanes(gate * load_lanes(both + count + i, count - i), y + i, count - i);
    }
  }
};

// Queries of one key head against all keys up to `position`, which is appended: work(g) for key head g.
struct Attend {
  const Layer &layer;
  const Decoder &d;
  float *qkv;  // [heads + 2 key heads, size]; the queries are turned in place
  const float *cos, *sin;  // [size]
  int64_t position;
  float *weights;  // [key heads, padded(position + 1)]
  float *y;        // [heads, size]

  __attribute__((always_inline)) inline void turn(const float *from, float *to) const {
    const int64_t half = d.size / 2;
    for (int64_t i = 0; i < half; i += LANES) {
      const int64_t left = half - i;
      const Lanes a = load_lanes(from + i, left), b = load_lanes(from + half + i, left);
      store_lanes(a * load_lanes(cos + i, left) - b * load_lanes(sin + i, left), to + i, left);
      store_lanes(b * load_lanes(cos + half + i, left) + a * load_lanes(sin + half + i, left), to + half + i, left);
    }
  }

  // In units of the largest: weights e^(score - largest). Returns their sum.
  __attribute__((always_inline)) inline float soften(float *scores, int64_t count) const {
    Lanes largest = all(-INFINITY);
    for (int64_t t = 0; t < count; t += LANES) {
      Lanes s = load_lanes(scores + t, count - t);
      for (int64_t l = count - t; l < LANES; ++l) s[l] = -INFINITY;
      largest = largest > s ? largest : s;
    }
    float most = largest[0];
    for (int l = 1; l < LANES; ++l) most = most > largest[l] ? most : largest[l];
    Lanes low = {}, high = {};
    for (int64_t t = 0; t < count; t += 2 * LANES) {
      for (int64_t u = t; u < count && u < t + 2 * LANES; u += LANES) {
        store_lanes(exp_of(load_lanes(scores + u, count - u) - most), scores + u, count - u);
        (u == t ? low : high) += load_lanes(scores + u, count - u);
      }
    }
    return sum_of_lanes(low, high);
  }

  // y[0 .. W * LANES) = sum over tokens of weight * value / sum, or the part of it that exists.
  template <int W>
  __attribute__((always_inline)) inline void mix(
      const float *w, const float *values, int64_t count, float sum, int64_t left, float *out) const {
    Lanes acc[W] = {};
    for (int64_t t = 0; t < count; ++t)
#pragma GCC unroll 8
      for (int j = 0; j < W; ++j) acc[j] += load_lanes(values + t * d.size + j * LANES, left - j * LANES) * w[t];
    for (int j = 0; j < W; ++j) store_lanes(acc[j] / sum, out + j * LANES, left - j * LANES);
  }

  __attribute__((always_inline)) inline void operator()(int64_t g) const {
    const int64_t size = d.size, group = d.heads / d.key_heads, count = position + 1;
    float *keys = layer.keys + g * layer.room * size, *values = layer.values + g * layer.room * size;
    float *scores = weights + g * ((count + 15) / 16 * 16);
    turn(qkv + (d.heads + g) * size, keys + position * size);
    memcpy(values + position * size, qkv + (d.heads + d.key_heads + g) * size, sizeof(float) * (size_t)size);
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      float *query = qkv + h * size;
      turn(query, query);
      for (int64_t t = 0; t < count; ++t) scores[t] = dot(keys + t * size, query, size) * d.scaling;
      const float sum = soften(scores, count);
      int64_t i = 0;
      for (; i + 8 * LANES <= size; i += 8 * LANES) mix<8>(scores, values + i, count, sum, 8 * LANES, y + h * size + i);
      for (; i < size; i += LANES) mix<1>(scores, values + i, count, sum, size - i, y + h * size + i);
    }
  }
};

// Logits of a head in float32: work(share) takes rows of four strips, as rows.h does and for the same reason.
struct Head {
  const Decoder &d;
  const float *x;
  float *y;

  static constexpr int64_t AT_ONCE = 16;
  __attribute__((always_inline)) inline int64_t strip() const { return (d.vocabulary + STRIPS - 1) / STRIPS; }
  __attribute__((always_inline)) inline int64_t shares() const { return (strip() + AT_ONCE - 1) / AT_ONCE; }

  __attribute__((always_inline)) inline void operator()(int64_t share) const {
    for (int64_t n = share * AT_ONCE; n < strip() && n < (share + 1) * AT_ONCE; ++n) {
      const float *rows[STRIPS];
      for (int s = 0; s < STRIPS; ++s) {
        const int64_t row = n + s * strip();
        rows[s] = d.head + (row < d.vocabulary ? row : n) * d.hidden;
      }
      float dots[STRIPS];
      dot_rows<STRIPS>(rows, x, d.hidden, dots);
      for (int s = 0; s < STRIPS; ++s) {
        const int64_t row = n + s * strip();
        if (row < d.vocabulary) y[row] = d.head_bias ? dots[s] + d.head_bias[row] : dots[s];
      }
    }
  }
};

// Where a step keeps what it computes on the way.
struct Buffers {
  float *wide, *narrow, *weights;  // of the widest layer's results, of what it reads, of attention
  char *memory;
};

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static void through_layer(
    const Decoder &d, const Layer &layer, float *x, const float *cos, const float *sin, int64_t position,
    const Buffers &b, int threads, int tier) {
  const auto linear = [&](const Linear &l, const float *from, float *to) {
    multiply(l, from, 1, l.columns, F32, to, b.memory, l.rows * l.columns < PARALLEL_FROM ? 1 : threads, tier);
  };
  const auto norm = [&](const Norm &n, const float *from, int64_t count, float *to) {
    in_tier(tier, Normalize{n, from, count, to}, 0);
  };
  const int64_t width = d.heads * d.size;
  norm(layer.norm, x, d.hidden, b.narrow);
  linear(layer.qkv, b.narrow, b.wide);
  const Attend attend = {layer, d, b.wide, cos, sin, position, b.weights, b.narrow};
  const bool alone = threads == 1 || width * (position + 1) < PARALLEL_FROM / 4;
  (void)alone;  // without OpenMP
#pragma omp parallel for num_threads(threads) if (!alone)
  for (int64_t g = 0; g < d.key_heads; ++g) in_tier(tier, attend, g);
  if (layer.o_norm.weight) norm(layer.o_norm, b.narrow, width, b.narrow);
  linear(layer.o, b.narrow, b.wide);
  in_tier(tier, Add{x, b.wide, d.hidden}, 0);
  norm(layer.norm_2, x, d.hidden, b.narrow);
  linear(layer.gate_up, b.narrow, b.wide);
  in_tier(tier, Gate{b.wide, d.inner, d.activation, b.narrow}, 0);
  if (layer.down_norm.weight) norm(layer.down_norm, b.narrow, d.inner, b.narrow);
  linear(layer.down, b.narrow, b.wide);
  in_tier(tier, Add{x, b.wide, d.hidden}, 0);
}

// x [hidden]: the token's embedding, which is used up. y [vocabulary], or without a head [hidden].
static bool decode(
    const Decoder &d, float *x, const float *cos, const float *sin, int64_t position, float *y, int threads, int tier) {
  const auto padded = [](int64_t count) { return (count + 15) / 16 * 16; };  // floats, to whole lines of 64 bytes
  int64_t memory = 0;
  for (int64_t i = 0; i < d.count; ++i) {
    const Layer &layer = d.layers[i];
    const Linear *const linears[] = {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
    for (const Linear *l : linears) memory = larger(memory, memory_for(*l, 1));
  }
  const int64_t narrow = padded(larger(larger(d.hidden, d.inner), d.heads * d.size));
  const int64_t wide = padded(larger(larger((d.heads + 2 * d.key_heads) * d.size, 2 * d.inner), d.hidden));
  const int64_t floats = narrow + wide + d.key_heads * padded(position + 1);
  float *all_of_it = (float *)aligned_alloc(64, (size_t)(floats * 4 + memory));
  if (!all_of_it) return false;
  const Buffers b = {all_of_it, all_of_it + wide, all_of_it + wide + narrow, (char *)(all_of_it + floats)};
  for (int64_t i = 0; i < d.count; ++i)
    through_layer(d, d.layers[i], x, cos, sin, position, b, threads, tier);
  in_tier(tier, Normalize{d.norm, x, d.hidden, d.head ? b.narrow : y}, 0);
  if (d.head) {
    const Head head = {d, b.narrow, y};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t share = 0; share < head.shares(); ++share) in_tier(tier, head, share);
  }
  free(all_of_it);
  return true;
}
