// What lies between the products of a transformer block: norm, rotation, SiLU, sums, cache slots.
#include "level.h"

namespace CPU_LEVEL {

INLINE float rounded(float x, Type type) {
  if (type == Type::fp32) return x;
  return half_bits_to_float(type == Type::bf16 ? to_bf16(x) : to_fp16(x), type);
}

INLINE vf rounded(vf x, Type type) {
  if (type == Type::fp32) return x;
  uint16_t line[kLanes];
  store_many(line, type, 0, x);
  return load_many(line, type, 0);
}

// y[i] = f(i) for i < n: vf f(load) with load(p) the numbers of p at i, a vector or one of them.
template <class F>
INLINE void each(Type type, int64_t n, void* y, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store_many(y, type, i, f([&](const void* p, Type t) { return load_many(p, t, i); }));
  for (; i < n; i++)
    store_one(y, type, i, f([&](const void* p, Type t) { return splat(load_one(p, t, i)); })[0]);
}

void rms_norm(const void* x, const void* weight, Type type, int64_t m, int64_t k, float eps,
              void* y) {
  const int64_t size = type == Type::fp32 ? 4 : 2;
  for (int64_t r = 0; r < m; r++) {
    const char* row = (const char*)x + r * k * size;
    vf squares{};
    float total = 0;
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) {
      vf v = load_many(row, type, i);
      squares += v * v;
    }
    for (; i < k; i++) total += load_one(row, type, i) * load_one(row, type, i);
    total += sum(squares);
    const float scale = 1.0f / __builtin_sqrtf(total / float(k) + eps);
    each(type, k, (char*)y + r * k * size, [&](auto at) __attribute__((always_inline)) {
      return at(weight, type) * rounded(at(row, type) * scale, type);
    });
  }
}

void rotate(const void* x, Type type, const float* cos, const float* sin, int64_t d, void* y) {
  const int64_t half = d / 2, size = type == Type::fp32 ? 4 : 2;
  const void* second = (const char*)x + half * size;
  each(type, half, y, [&](auto at) __attribute__((always_inline)) {
    return at(x, type) * at(cos, Type::fp32) - at(second, type) * at(sin, Type::fp32);
  });
  each(type, half, (char*)y + half * size, [&](auto at) __attribute__((always_inline)) {
    return at(second, type) * at(cos, Type::fp32) + at(x, type) * at(sin, Type::fp32);
  });
}

void silu_mul(const void* gate, const void* up, Type type, int64_t n, void* y) {
  each(type, n, y, [&](auto at) __attribute__((always_inline)) {
    vf g = at(gate, type);
    vf e = exp(g < 0 ? g : -g);  // g / (1 + e^-g), without overflow
    vf silu = (g < 0 ? g * e : g) / (e + 1.0f);
    return rounded(silu, type) * at(up, type);
  });
}

void add(const void* a, const void* b, Type type, int64_t n, void* y) {
  each(type, n, y, [&](auto at) __attribute__((always_inline)) {
    return at(a, type) + at(b, type);
  });
}

void multiply_scale(const void* x, const void* scale, Type type, int64_t n, void* y) {
  each(type, n, y, [&](auto at) __attribute__((always_inline)) {
    return at(x, type) * at(scale, Type::bf16);
  });
}

float quantize_slot(const void* x, Type type, int64_t d, Type scale_type, int8_t* codes) {
  float most = 0;
  for (int64_t i = 0; i < d; i++) most = larger(most, __builtin_fabsf(load_one(x, type, i)));
  const float scale = rounded(at_least(most / 127, 1e-5f), scale_type);
  for (int64_t i = 0; i < d; i++) {
    float q = max(-127.0f, -max(-127.0f, -load_one(x, type, i) / scale));
    codes[i] = int8_t(round_to_int(splat(q))[0]);
  }
  return scale;
}

}  // namespace CPU_LEVEL
