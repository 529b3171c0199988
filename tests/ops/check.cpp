// Every tier that this machine (or an emulator) runs, against sums written out in int64 and the same float operations.
// Buffers are exactly as long as they have to be, so a sanitizer sees every step beyond them. Exits with 1 on a
// difference.
#include "packed_linear.cpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

static std::mt19937 draw(1);
static int pick(int from, int to) { return from + (int)(draw() % (unsigned)(to - from + 1)); }

struct Case {
  int64_t tokens, columns, rows;
  int layout, type;
  bool bias, largest;  // largest: all inputs equal, all codes +1
};

static int per_byte(int layout) { return layout == I2 ? 4 : layout == T5 ? 5 : 8; }

static uint8_t pack(const int8_t *codes, int count, int layout) {
  int byte = 0, place = 1;
  for (int i = 0; i < count; ++i) {
    byte += place * (layout == B1 ? codes[i] > 0 : codes[i] + 1);
    place *= layout == I2 ? 4 : layout == T5 ? 3 : 2;
  }
  return (uint8_t)byte;
}

template <class T> static void fill(std::vector<char> &bytes, const std::vector<float> &values) {
  bytes.resize(values.size() * sizeof(T));
  for (size_t i = 0; i < values.size(); ++i) store(values[i], (T *)bytes.data() + i);
}
static std::vector<char> as_type(const std::vector<float> &values, int type) {
  std::vector<char> bytes;
  if (type == F32) fill<float>(bytes, values);
  else if (type == BF16) fill<bf16>(bytes, values);
  else fill<f16>(bytes, values);
  return bytes;
}
static float value_of(const std::vector<char> &bytes, size_t i, int type) {
  if (type == F32) return ((const float *)bytes.data())[i];
  return type == BF16 ? to_float(((const bf16 *)bytes.data())[i]) : to_float(((const f16 *)bytes.data())[i]);
}

static long differences(const Case &c, int tier, int threads) {
  const int per = per_byte(c.layout);
  const int64_t width = (c.columns + per - 1) / per;
  std::vector<int8_t> codes((size_t)(c.rows * c.columns));
  for (auto &code : codes) code = (int8_t)(c.largest ? 1 : c.layout == B1 ? 2 * pick(0, 1) - 1 : pick(-1, 1));
  std::vector<uint8_t> packed((size_t)(c.rows * width));
  for (int64_t n = 0; n < c.rows; ++n)
    for (int64_t j = 0; j < width; ++j) {
      const int64_t left = c.columns - j * per;
      const int count = (int)(left < per ? left : per);
      packed[(size_t)(n * width + j)] = pack(&codes[(size_t)(n * c.columns + j * per)], count, c.layout);
    }
  std::normal_distribution<float> normal;
  std::vector<float> x((size_t)(c.tokens * c.columns)), scale((size_t)c.rows), bias((size_t)c.rows);
  for (auto &each : x) each = c.largest ? 3.0f : normal(draw);
  if (c.tokens > 2) x[(size_t)c.columns] = NAN, x[(size_t)(2 * c.columns)] = INFINITY;
  for (auto &each : scale) each = 0.01f + std::fabs(normal(draw));
  for (auto &each : bias) each = normal(draw);
  const auto inputs = as_type(x, c.type), biases = as_type(bias, c.type);
  auto y = as_type(std::vector<float>((size_t)(c.tokens * c.rows)), c.type);
  const Linear layer = {packed.data(), scale.data(), c.bias ? biases.data() : nullptr, c.rows, c.columns, width, 1,
                        c.layout, c.type, 127.0f};
  const int failed = bitnet_linear(&layer, inputs.data(), c.tokens, c.type, y.data(), threads, tier);
  if (failed || bitnet_damaged_byte(packed.data(), c.rows, width, c.columns, c.layout) != -1) return c.tokens * c.rows;
  long wrong = 0;
  for (int64_t m = 0; m < c.tokens; ++m) {
    std::vector<int> q((size_t)c.columns);
    float largest = 1e-5f;
    bool finite = true;
    for (int64_t k = 0; k < c.columns; ++k) {
      const float value = value_of(inputs, (size_t)(m * c.columns + k), c.type);
      finite = finite && std::isfinite(value);
      largest = std::fmax(largest, std::fabs(value));
    }
    const float step = largest / 127.0f;
    for (int64_t k = 0; finite && k < c.columns; ++k)
      q[(size_t)k] = (int)std::nearbyint(value_of(inputs, (size_t)(m * c.columns + k), c.type) / step);
    for (int64_t n = 0; n < c.rows; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < c.columns; ++k) sum += q[(size_t)k] * codes[(size_t)(n * c.columns + k)];
      const float product = scale[(size_t)n] * step;
      float value = (float)sum * product;
      if (c.bias) value = value + value_of(biases, (size_t)n, c.type);
      std::vector<float> one(1, finite ? value : NAN);
      const float expected = value_of(as_type(one, c.type), 0, c.type);
      const float found = value_of(y, (size_t)(m * c.rows + n), c.type);
      wrong += finite ? bits_of(found) != bits_of(expected) : !std::isnan(found);
    }
  }
  return wrong;
}

int main() {
  static const char *const NAMES[] = {"scalar", "avx2", "avx512", "amx", "neon"};
  static const int64_t TOKENS[] = {1, 2, 3, 8, 17, 37}, ROWS[] = {1, 5, 33, 67};
  static const int64_t COLUMNS[] = {1, 3, 7, 63, 255, 256, 257, 319, 512, 1283, 4160};
  long wrong = 0;
  for (int tier = 0; tier < TIERS; ++tier) {
    if (!bitnet_has_tier(tier)) {
      printf("%s did not run\n", NAMES[tier]);
      continue;
    }
    long cases = 0, here = 0;
    for (int layout = I2; layout <= B1; ++layout) {
      for (int64_t tokens : TOKENS)
        for (int64_t columns : COLUMNS) {
          const int64_t rows = ROWS[cases % 4];
          const int type = (int)(cases % 3), threads = 1 + (int)(cases % 2);
          here += differences({tokens, columns, rows, layout, type, cases % 2 == 0, false}, tier, threads);
          ++cases;
        }
      for (int64_t tokens : {1, 13})
        here += differences({tokens, 65536, 3, layout, F32, false, true}, tier, 1), ++cases;
      here += differences({291, 90, 70, layout, BF16, true, false}, tier, 2), ++cases;
      here += differences({1, 131072, 2, layout, F32, false, true}, tier, 1), ++cases;
    }
    printf("%s: %ld cases, %ld differences\n", NAMES[tier], cases, here);
    wrong += here;
  }
  return wrong != 0;
}
