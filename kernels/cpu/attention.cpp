// Attention of new tokens of one kv head over a stretch of the cache, in one pass.
//
// The cache is read once, kAttentionBlock slots at a time, widened to fp32 in scratch (keys
// transposed), and used by all query rows: the heads of the group times the tokens. Scores and
// values are then plain products. Running maximum and sum as in online softmax (Milakov and
// Gimelshein, 2018), so stretches can be merged afterwards.
#include "multiply.h"

namespace CPU_LEVEL {

constexpr int kBlock = kAttentionBlock;

enum class Kind { fp32, bf16, fp16, int8 };

// kLanes numbers of the cache at p.
template <Kind kind>
INLINE vf cache_load(const char* p) {
  if constexpr (kind == Kind::int8) return to_float(widen8((const int8_t*)p));
  if constexpr (kind == Kind::bf16) return bf16_load(p);
  if constexpr (kind == Kind::fp16) return fp16_load(p);
  if constexpr (kind == Kind::fp32) return load<vf>(p);
}

// The last `count` < kLanes numbers of a row, and zeros.
template <Kind kind>
static vf cache_edge(const char* p, int64_t count) {
  char line[4 * kLanes] = {};
  memcpy(line, p, count * (kind == Kind::int8 ? 1 : kind == Kind::fp32 ? 4 : 2));
  return cache_load<kind>(line);
}

// Keys s0 .. s0 + slots, transposed: keys [d, kBlock]; what lies in later columns does not matter.
// And the values: [slots, padded(d)], zeros at the end of rows.
template <Kind kind>
static void widen_block(const Attention& a, int64_t s0, int64_t slots, float* keys, float* values) {
  constexpr int64_t size = kind == Kind::int8 ? 1 : kind == Kind::fp32 ? 4 : 2;
  const int64_t d = a.d, width = padded(d), k_stride = a.k_stride * size, v_stride = a.v_stride * size;
  const char *k = (const char*)a.k + s0 * k_stride, *v = (const char*)a.v + s0 * v_stride;
  for (int64_t s = 0; s < slots; s += kLanes, k += kLanes * k_stride) {
    const int64_t last = min(kLanes, slots - s) - 1;
    for (int64_t i = 0; i < d; i += kLanes) {
      vf rows[kLanes];
      UNROLL
      for (int j = 0; j < kLanes; j++) {
        const char* p = k + min(j, last) * k_stride + i * size;
        rows[j] = i + kLanes <= d ? cache_load<kind>(p) : cache_edge<kind>(p, d - i);
      }
      transpose(rows);
      UNROLL
      for (int j = 0; j < kLanes; j++)
        if (i + j < d) store(keys + (i + j) * kBlock + s, rows[j]);
    }
  }
  for (int64_t s = 0; s < slots; s++, values += width, v += v_stride) {
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) store(values + i, cache_load<kind>(v + i * size));
    if (i < d) store(values + i, cache_edge<kind>(v + i * size, d - i));
    for (i += i < d ? kLanes : 0; i < width; i += kLanes) store(values + i, vf{});
  }
}

struct Count {
  alignas(64) int32_t lanes[kLanes] = {};
  constexpr Count() {
    for (int i = 0; i < kLanes; i++) lanes[i] = i;
  }
};
static constexpr Count kCount;

// scores [kBlock] of row r to weights, of which the first `seen` count; out is rescaled for them.
INLINE void soften(const Attention& a, int64_t r, int64_t seen, const float* ks, const float* vs,
                   float* scores) {
  constexpr int kVectors = kBlock / kLanes;
  const vi lanes = load<vi>(kCount.lanes);
  vf line[kVectors], best = splat(a.max[r]);
  UNROLL
  for (int i = 0; i < kVectors; i++) {
    line[i] = load<vf>(scores + i * kLanes);
    if (ks) line[i] *= load<vf>(ks + i * kLanes);
    line[i] = lanes + int32_t(i * kLanes) < int32_t(seen) ? line[i] : splat(-1e30f);
    best = max(best, line[i]);
  }
  const float top = max_of(best), shrink = exp(splat(a.max[r] - top))[0];
  vf total{};
  UNROLL
  for (int i = 0; i < kVectors; i++) {
    vf p = exp(line[i] - top);
    p = line[i] > -1e29f ? p : vf{};
    total += p;
    if (vs) p *= load<vf>(vs + i * kLanes);
    store(scores + i * kLanes, p);
  }
  a.sum[r] = a.sum[r] * shrink + sum(total);
  a.max[r] = top;
  if (shrink != 1)
    for (int64_t i = 0; i < padded(a.d); i += kLanes)
      store(a.out + r * padded(a.d) + i, load<vf>(a.out + r * padded(a.d) + i) * shrink);
}

constexpr int kFewQueries = 8;  // up to here the cache goes through the registers, not the scratch

// 2 kLanes numbers of the cache at p. bf16 widens at one operation per vector, "paired" as in
// float.cpp: into the even numbers and the odd ones. Others: into the first half and the second.
template <Kind kind>
INLINE void cache_pair(const char* p, vf& a, vf& b) {
  constexpr int64_t size = kind == Kind::int8 ? 1 : kind == Kind::fp32 ? 4 : 2;
  if constexpr (kind == Kind::bf16) {
    const vu v = load<vu>(p);
    a = bf16_even(v);
    b = bf16_odd(v);
  } else {
    a = cache_load<kind>(p);
    b = cache_load<kind>(p + kLanes * size);
  }
}

// Lane i: number 2 i, or 2 i + 1, of a and b one after the other; and back.
INLINE vf even_of(vf a, vf b) { return pick(a, b, 2 * load<vi>(kCount.lanes)); }
INLINE vf odd_of(vf a, vf b) { return pick(a, b, 2 * load<vi>(kCount.lanes) + 1); }
INLINE void pair(vf& a, vf& b) {
  const vf even = even_of(a, b);
  b = odd_of(a, b);
  a = even;
}
INLINE void unpair(vf& even, vf& odd) {
  const vi lanes = load<vi>(kCount.lanes), from = (lanes >> 1) + (lanes & 1) * kLanes;
  const vf low = pick(even, odd, from);
  odd = pick(even, odd, from + kLanes / 2);
  even = low;
}

// Lane i of the result: the sum of v[i].
INLINE vf sums_of(vf (&v)[kLanes]) {
  UNROLL
  for (int n = kLanes / 2; n > 0; n /= 2)
    UNROLL
    for (int i = 0; i < n; i++)
      v[i] = even_of(v[2 * i], v[2 * i + 1]) + odd_of(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// Scores [R, kBlock] of R rows at q, ordered as cache_pair() reads the keys; d is a multiple of
// 2 kLanes. Slots past the last repeat it. Meanwhile the keys further on and the values of these
// slots, which are next, are asked for.
template <Kind kind, int R>
static void few_scores(const Attention& a, const float* q, int64_t s0, int64_t slots, float* scores) {
  constexpr int64_t size = kind == Kind::int8 ? 1 : kind == Kind::fp32 ? 4 : 2;
  constexpr int kSlots = kLanes / (R == 3 ? 4 : R);  // so many that their sums fill one vector
  const int64_t stride = a.k_stride * size, d = a.d;
  const char* k = (const char*)a.k + s0 * stride;
  const char* v = (const char*)a.v + s0 * a.v_stride * size;
  constexpr int kAhead = 2048;  // bytes
  for (int64_t s = 0; s < slots; s += kSlots) {
    vf dots[kLanes] = {};
    for (int64_t i = 0; i < d; i += 2 * kLanes)
      UNROLL
      for (int j = 0; j < kSlots; j++) {
        __builtin_prefetch(k + (s + j) * stride + i * size + kAhead, 0, 3);
        __builtin_prefetch(v + (s + j) * a.v_stride * size + i * size, 0, 3);
        vf a, b;
        cache_pair<kind>(k + min(s + j, slots - 1) * stride + i * size, a, b);
        UNROLL
        for (int r = 0; r < R; r++) {
          dots[r * kSlots + j] += a * load<vf>(q + r * d + i);
          dots[r * kSlots + j] += b * load<vf>(q + r * d + i + kLanes);
        }
      }
    float line[kLanes];
    store(line, sums_of(dots));
    for (int r = 0; r < R; r++) memcpy(scores + r * kBlock + s, line + r * kSlots, kSlots * 4);
  }
}

// out [R, padded(d)] += weights [R, kBlock] times the values; d is a multiple of 4 kLanes.
template <Kind kind, int R>
static void few_values(const Attention& a, const float* weights, int64_t s0, int64_t slots,
                       float* out) {
  constexpr int64_t size = kind == Kind::int8 ? 1 : kind == Kind::fp32 ? 4 : 2;
  const int64_t stride = a.v_stride * size, width = padded(a.d);
  for (int64_t i = 0; i < a.d; i += 4 * kLanes) {
    const char* v = (const char*)a.v + s0 * stride + i * size;
    vf sums[R][4];
    UNROLL
    for (int r = 0; r < R; r++)
      UNROLL
      for (int c = 0; c < 4; c += 2) {
        sums[r][c] = load<vf>(out + r * width + i + c * kLanes);
        sums[r][c + 1] = load<vf>(out + r * width + i + (c + 1) * kLanes);
        if (kind == Kind::bf16) pair(sums[r][c], sums[r][c + 1]);
      }
    for (int64_t s = 0; s < slots; s++, v += stride)
      UNROLL
      for (int c = 0; c < 4; c += 2) {
        vf a, b;
        cache_pair<kind>(v + c * kLanes * size, a, b);
        UNROLL
        for (int r = 0; r < R; r++) {
          sums[r][c] += a * weights[r * kBlock + s];
          sums[r][c + 1] += b * weights[r * kBlock + s];
        }
      }
    UNROLL
    for (int r = 0; r < R; r++)
      UNROLL
      for (int c = 0; c < 4; c += 2) {
        if (kind == Kind::bf16) unpair(sums[r][c], sums[r][c + 1]);
        store(out + r * width + i + c * kLanes, sums[r][c]);
        store(out + r * width + i + (c + 1) * kLanes, sums[r][c + 1]);
      }
  }
}

// `q`: the queries, ordered as cache_pair() reads the keys.
template <Kind kind>
static void few_rows(const Attention& a, const float* q, int64_t s0, int64_t slots, const float* ks,
                     const float* vs, float* scores) {
  each_row<4, 1>(0, 0, a.rows, [&](auto rows, auto, int64_t, int64_t r0) {
    few_scores<kind, rows.value>(a, q + r0 * a.d, s0, slots, scores);
    for (int64_t r = r0; r < r0 + rows.value; r++)
      soften(a, r, min(slots, a.first + r % a.tokens + 1 - s0), ks, vs, scores + (r - r0) * kBlock);
    few_values<kind, rows.value>(a, scores, s0, slots, a.out + r0 * padded(a.d));
  });
}

template <Kind kind>
static void attend_as(const Attention& a, int64_t begin, int64_t end) {
  const int64_t width = padded(a.d), heads = a.rows / a.tokens;
  const bool few = a.rows <= kFewQueries && a.d % (4 * kLanes) == 0;
  float *keys = a.scratch, *values = keys + kBlock * a.d, *scores = values + kBlock * width;
  const float* paired = a.q;
  if (few && kind == Kind::bf16) {
    paired = keys;
    for (int64_t i = 0; i < a.rows * a.d; i += 2 * kLanes) {
      vf first = load<vf>(a.q + i), second = load<vf>(a.q + i + kLanes);
      pair(first, second);
      store(keys + i, first);
      store(keys + i + kLanes, second);
    }
  }
  float k_line[kBlock] = {}, v_line[kBlock] = {};
  const float* ks = a.k_scale ? k_line : nullptr;
  const float* vs = a.k_scale ? v_line : nullptr;
  for (int64_t s0 = begin; s0 < end; s0 += kBlock) {
    const int64_t slots = min(kBlock, end - s0);
    const int64_t blind = s0 > a.first ? s0 - a.first : 0;  // tokens before this see none of these
    if (blind >= a.tokens) break;
    if (a.k_scale) {
      memcpy(k_line, a.k_scale + s0, slots * sizeof(float));
      memcpy(v_line, a.v_scale + s0, slots * sizeof(float));
    }
    if (few && !blind) {
      few_rows<kind>(a, paired, s0, slots, ks, vs, scores);
      continue;
    }
    widen_block<kind>(a, s0, slots, keys, values);
    auto rows = [&](int64_t r0, int64_t r1) {
      for (; r0 < r1; r0 += kBlock) {  // as many rows as `scores` holds
        const int64_t count = min(kBlock, r1 - r0);
        memset(scores, 0, count * kBlock * sizeof(float));
        multiply_all(count, kBlock, a.q + r0 * a.d, a.d, keys, kBlock, a.d, scores, kBlock);
        for (int64_t r = r0; r < r0 + count; r++)
          soften(a, r, min(slots, a.first + r % a.tokens + 1 - s0), ks, vs,
                 scores + (r - r0) * kBlock);
        multiply_all(count, width, scores, kBlock, values, width, slots, a.out + r0 * width, width);
      }
    };
    if (!blind) rows(0, a.rows);
    else
      for (int64_t h = 0; h < heads; h++) rows(h * a.tokens + blind, (h + 1) * a.tokens);
  }
}

void attend(const Attention& a, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < a.rows; r++) {
    a.max[r] = -1e30f;  // finite: the difference of two must not be NaN
    a.sum[r] = 0;
  }
  memset(a.out, 0, a.rows * padded(a.d) * sizeof(float));
  if (a.k_scale) attend_as<Kind::int8>(a, begin, end);
  else if (a.type == Type::bf16) attend_as<Kind::bf16>(a, begin, end);
  else if (a.type == Type::fp16) attend_as<Kind::fp16>(a, begin, end);
  else attend_as<Kind::fp32>(a, begin, end);
}

// The stretches of a row joined: weights exp(max - top) make their sums comparable.
void merge(const float* parts, int64_t splits, int64_t stride, int64_t rows, int64_t r, int64_t d,
           Type type, void* y, int64_t at) {
  const float *max_at = parts + rows * padded(d) + r, *sum_at = max_at + rows;
  float top = -1e30f, total = 0;
  for (int64_t s = 0; s < splits; s++) top = max(top, max_at[s * stride]);
  auto weight = [&](int64_t s) { return exp(splat(max_at[s * stride] - top))[0]; };
  for (int64_t s = 0; s < splits; s++) total += weight(s) * sum_at[s * stride];
  for (int64_t i = 0; i < d; i += kLanes) {
    vf out{};
    for (int64_t s = 0; s < splits; s++)
      out += load<vf>(parts + s * stride + r * padded(d) + i) * (weight(s) / total);
    if (i + kLanes <= d) store_many(y, type, at + i, out);
    else
      for (int j = 0; i + j < d; j++) store_one(y, type, at + i + j, out[j]);
  }
}

}  // namespace CPU_LEVEL
