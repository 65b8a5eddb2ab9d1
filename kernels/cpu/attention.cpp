// Attention of a few query rows of one kv head over a stretch of the cache, in one pass.
//
// The cache is read once, kAttentionBlock slots at a time, widened to fp32 in scratch, and used by
// all query rows (the heads of the group times the tokens). Running maximum and sum as in online
// softmax (Milakov and Gimelshein, 2018), so stretches can be merged afterwards.
#include "level.h"

namespace CPU_LEVEL {

constexpr int kBlock = kAttentionBlock;

// e^x for x <= 0: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2]; relative error 2e-7.
INLINE vf exp(vf x) {
  x = max(x, splat(-87.0f));
  vi n = round_to_int(x * 1.44269504f);
  vf r = x - to_float(n) * 0.693359375f + to_float(n) * 2.12194440e-4f;
  vf p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (vf)((n + 127) << 23);
}

// `slots` rows of the cache to fp32 [slots, d]; d need not be a multiple of anything.
static void widen_cache(const void* from, Type type, bool int8, int64_t slots, int64_t d,
                        int64_t stride, float* out) {
  for (int64_t s = 0; s < slots; s++, out += d) {
    int64_t i = 0;
    if (int8) {
      const int8_t* row = (const int8_t*)from + s * stride;
      for (; i + kLanes <= d; i += kLanes) store(out + i, to_float(widen8(row + i)));
      for (; i < d; i++) out[i] = row[i];
    } else {
      for (; i + kLanes <= d; i += kLanes) store(out + i, load_many(from, type, s * stride + i));
      for (; i < d; i++) out[i] = load_one(from, type, s * stride + i);
    }
  }
}

// scores[s] = q . k[s] for kBlock slots.
INLINE void dot_block(const float* q, const float* k, int64_t slots, int64_t d, float* scores) {
  for (int64_t s = 0; s < slots; s += 4) {
    vf dots[4] = {};
    float edge[4] = {};
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes)
      UNROLL
      for (int j = 0; j < 4; j++) dots[j] += load<vf>(q + i) * load<vf>(k + (s + j) * d + i);
    for (; i < d; i++)
      for (int j = 0; j < 4; j++) edge[j] += q[i] * k[(s + j) * d + i];
    UNROLL
    for (int j = 0; j < 4; j++) scores[s + j] = sum(dots[j]) + edge[j];
  }
}

// out[i] += sum over slots of p[s] * v[s][i].
INLINE void weigh_block(const float* p, const float* v, int64_t slots, int64_t d, float* out) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    vf o[4];
    UNROLL
    for (int j = 0; j < 4; j++) o[j] = load<vf>(out + i + j * kLanes);
    for (int64_t s = 0; s < slots; s++)
      UNROLL
      for (int j = 0; j < 4; j++) o[j] += p[s] * load<vf>(v + s * d + i + j * kLanes);
    UNROLL
    for (int j = 0; j < 4; j++) store(out + i + j * kLanes, o[j]);
  }
  for (; i < d; i++)
    for (int64_t s = 0; s < slots; s++) out[i] += p[s] * v[s * d + i];
}

void attend(const Attention& a, int64_t begin, int64_t end) {
  const bool int8 = a.k_scale != nullptr;
  const int64_t size = int8 ? 1 : a.type == Type::fp32 ? 4 : 2;
  float* keys = a.scratch;
  float* values = keys + kBlock * a.d;
  for (int64_t r = 0; r < a.rows; r++) {
    a.max[r] = -1e30f;  // finite: the difference of two must not be NaN
    a.sum[r] = 0;
  }
  memset(a.out, 0, a.rows * a.d * sizeof(float));
  for (int64_t s0 = begin; s0 < end; s0 += kBlock) {
    const int64_t slots = min(kBlock, end - s0);
    widen_cache((const char*)a.k + s0 * a.k_stride * size, a.type, int8, slots, a.d, a.k_stride,
                keys);
    widen_cache((const char*)a.v + s0 * a.v_stride * size, a.type, int8, slots, a.d, a.v_stride,
                values);
    // Slots past the end are computed by fours: they must hold numbers.
    memset(keys + slots * a.d, 0, ((slots + 3) / 4 * 4 - slots) * a.d * sizeof(float));
    for (int64_t r = 0; r < a.rows; r++) {
      const int64_t seen = min(slots, a.limit[r] - s0);
      if (seen <= 0) continue;
      alignas(64) float scores[kBlock];
      dot_block(a.q + r * a.d, keys, seen, a.d, scores);
      float top = a.max[r];
      for (int64_t s = 0; s < seen; s++) {
        if (int8) scores[s] *= a.k_scale[s0 + s];
        top = max(top, scores[s]);
      }
      for (int64_t s = seen; s < kBlock; s++) scores[s] = -1e30f;
      const float shrink = exp(splat(a.max[r] - top))[0];
      vf total{};
      for (int64_t s = 0; s < seen; s += kLanes) {
        vf p = exp(load<vf>(scores + s) - top);
        total += load<vf>(scores + s) > -1e29f ? p : vf{};
        store(scores + s, p);
      }
      a.max[r] = top;
      a.sum[r] = a.sum[r] * shrink + sum(total);
      if (int8)
        for (int64_t s = 0; s < seen; s++) scores[s] *= a.v_scale[s0 + s];
      float* out = a.out + r * a.d;
      if (shrink != 1)
        for (int64_t i = 0; i < a.d; i++) out[i] *= shrink;
      weigh_block(scores, values, seen, a.d, out);
    }
  }
}

// The stretches of each row joined: weights exp(max - top) make their sums comparable.
void merge(const float* parts, int64_t pairs, int64_t splits, int64_t rows, int64_t d, Type type,
           void* y) {
  const int64_t size = rows * (d + 2);
  for (int64_t i = 0; i < pairs * rows; i++) {
    const float* part = parts + i / rows * splits * size;
    const int64_t r = i % rows;
    float top = -1e30f, total = 0;
    for (int64_t s = 0; s < splits; s++) top = max(top, part[s * size + rows * d + r]);
    auto weight = [&](int64_t s) { return exp(splat(part[s * size + rows * d + r] - top))[0]; };
    for (int64_t s = 0; s < splits; s++)
      total += weight(s) * part[s * size + rows * d + rows + r];
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) {
      vf out{};
      for (int64_t s = 0; s < splits; s++)
        out += load<vf>(part + s * size + r * d + c) * (weight(s) / total);
      store_many(y, type, i * d + c, out);
    }
    for (; c < d; c++) {
      float out = 0;
      for (int64_t s = 0; s < splits; s++) out += part[s * size + r * d + c] * (weight(s) / total);
      store_one(y, type, i * d + c, out);
    }
  }
}

}  // namespace CPU_LEVEL
