// y = x W^T with n-bit codes, w = (value(code) - zero) * scale: integers, small floats, a codebook.
//
// Tile t holds output rows 16 t .. 16 t + 15; 32 columns are n words of 32 bits per row, word by
// word for the 16 rows: each vector lane walks the bit stream of its row. 32 columns at a time are
// widened into a block of fp32 that stays in the nearest cache, and every row of x meets it there.
// With zeros, sum x w = scale * (sum x value - zero * sum x) over each group.
#include "level.h"

namespace CPU_LEVEL {

constexpr int kBlock = 32;     // columns that are widened at a time
constexpr int kMaxRows = 16;   // rows of x that coded_tiles takes

template <int I, int End, class F>
INLINE void unrolled(const F& f) {
  if constexpr (I < End) {
    f(Int<I>{});
    unrolled<I + 1, End>(f);
  }
}

// Code `i` of a block, part p of its 16 rows, in the low `Bits` bits; above them anything.
template <int Bits, int i>
INLINE vu code(const uint32_t* words, int p) {
  constexpr int word = i * Bits / 32, shift = i * Bits % 32;
  vu v = load<vu>(words + word * 16 + p * kLanes);
  if constexpr (shift > 0) v = v >> shift;
  if constexpr (shift + Bits > 32)
    v |= load<vu>(words + (word + 1) * 16 + p * kLanes) << (32 - shift);
  return v;
}

// table[v % 16]
INLINE vf lookup16(const float* table, vu v) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)v, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)v);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)v);
  return _mm256_blendv_ps(low, high, (__m256)(v << 28));
#else
  vf out;
  for (int j = 0; j < kLanes; j++) out[j] = table[v[j] & 15];
  return out;
#endif
}

// The value of a code that is a float of sign, E exponent and M mantissa bits. Its bits move to
// their place in fp32; a subnormal gets the exponent above it and loses the leading one again.
template <int Bits>
INLINE vf small_float(const Coded& c, vu v) {
#if defined(__AVX512F__)
  if constexpr (Bits <= 6) {  // a table of 32 magnitudes (6 bits), or of everything
    const float* t = c.table;
    __m512 low = _mm512_loadu_ps(t), high = _mm512_loadu_ps(t + 16);
    vf out = (vf)_mm512_permutex2var_ps(low, (__m512i)v, high);
    if constexpr (Bits == 6) out = (vf)((vu)out ^ ((v << 26) & 0x80000000u));
    return out;
  }
#endif
  const int bias = (1 << (c.exponent_bits - 1)) - 1;
  vu top = v << (32 - Bits);
  vu magnitude = (top & 0x7fffffffu) >> (8 - c.exponent_bits);
  vu bits = magnitude + (uint32_t(127 - bias) << 23);
  vf below = (vf)(bits + 0x800000u) - (vf)(vu{} + (uint32_t(128 - bias) << 23));
  vf value = (vi)magnitude < 0x800000 ? below : (vf)bits;
  return (vf)((vu)value | (top & 0x80000000u));
}

enum Kind { kInteger, kFloat, kTable, kRounded };

template <Kind kind, int Bits>
INLINE vf value(const Coded& c, vu v, vf group_scale) {
#if defined(__AVX512F__)
  constexpr bool table = Bits <= 4;
#else
  constexpr bool table = kind == kTable;
#endif
  if constexpr (kind == kFloat) return small_float<Bits>(c, v);
  vf out;
  if constexpr (table) out = lookup16(c.table, v);
  else out = to_float((vi)(v & ((1u << Bits) - 1))) + c.table[0];
  if constexpr (kind == kRounded) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: the sum has no room for a fraction
    out = (out * group_scale + magic) - magic;
  }
  return out;
}

// The 32 columns of a block as fp32 values: column i of row r at out[16 i + r].
typedef void (*Decode)(const Coded&, const uint32_t* words, const uint32_t* positions,
                       const uint16_t* group_scales, float* out);

template <Kind kind, int Bits>
static void decode(const Coded& c, const uint32_t* words, const uint32_t*,
                   const uint16_t* group_scales, float* out) {
  vf scale[kParts] = {};
  if constexpr (kind == kRounded)
    for (int p = 0; p < kParts; p++) scale[p] = fp16_load(group_scales + p * kLanes);
  unrolled<0, kBlock>([&](auto i) __attribute__((always_inline)) {
    for (int p = 0; p < kParts; p++)
      store(out + i.value * 16 + p * kLanes,
            value<kind, Bits>(c, code<Bits, i.value>(words, p), scale[p]));
  });
}

// Of each 4 columns 2 are kept: 4-bit codes 2 q, 2 q + 1 and positions of 2 bits each.
static void decode_sparse(const Coded& c, const uint32_t* words, const uint32_t* positions,
                          const uint16_t*, float* out) {
  unrolled<0, kBlock / 4>([&](auto q) __attribute__((always_inline)) {
    for (int p = 0; p < kParts; p++) {
      vu where = load<vu>(positions + p * kLanes) >> (4 * q.value);
      vi first = (vi)(where & 3), second = (vi)((where >> 2) & 3);
      vf a = value<kInteger, 4>(c, code<4, 2 * q.value>(words, p), vf{});
      vf b = value<kInteger, 4>(c, code<4, 2 * q.value + 1>(words, p), vf{});
      UNROLL
      for (int j = 0; j < 4; j++) {
        vf none{};
        vf v = second == j ? b : (first == j ? a : none);
        store(out + (4 * q.value + j) * 16 + p * kLanes, v);
      }
    }
  });
}

static Decode choose(const Coded& c) {
  if (c.positions) return decode_sparse;
  if (c.group_scales) return decode<kRounded, 4>;
  if (c.exponent_bits) {
    constexpr Decode floats[] = {decode<kFloat, 4>, decode<kFloat, 5>, decode<kFloat, 6>,
                                 decode<kFloat, 7>, decode<kFloat, 8>};
    return floats[c.bits - 4];
  }
  if (!c.integers) return decode<kTable, 4>;
  constexpr Decode integers[] = {decode<kInteger, 1>, decode<kInteger, 2>, decode<kInteger, 3>,
                                 decode<kInteger, 4>, decode<kInteger, 5>, decode<kInteger, 6>,
                                 decode<kInteger, 7>, decode<kInteger, 8>};
  return integers[c.bits - 1];
}

// Where a tile's parts lie.
struct Tile {
  const uint32_t *codes, *positions;
  const char* scales;
  const uint8_t* zeros;
  const uint16_t* group_scales;

  Tile(const Coded& c, int64_t tile) {
    const int64_t blocks = c.a.kpad / kBlock, at = tile * c.a.groups * 16;
    codes = c.codes + tile * blocks * words(c) * 16;
    positions = c.positions ? c.positions + tile * blocks * 16 : nullptr;
    scales = (const char*)c.scales + tile * c.scale_groups * 16 * size(c);
    zeros = c.zeros ? c.zeros + at : nullptr;
    group_scales = c.group_scales ? c.group_scales + at : nullptr;
  }
  static int64_t words(const Coded& c) { return c.positions ? 2 : c.bits; }
  static int64_t size(const Coded& c) { return c.scale_type == Type::fp32 ? 4 : 2; }

  void decode(const Coded& c, Decode f, int64_t block, int64_t group, float* out) const {
    f(c, codes + block * words(c) * 16, positions ? positions + block * 16 : nullptr,
      group_scales ? group_scales + group * 16 : nullptr, out);
  }
  vf scale(const Coded& c, int64_t group, int p) const {
    int64_t g = c.scale_groups > 1 ? group : 0;
    return load_many(scales, c.scale_type, g * 16 + p * kLanes);
  }
  vf zero(int64_t group, int p) const {
    typedef uint8_t bytes __attribute__((vector_size(kLanes)));
    if (!zeros) return vf{};
    return to_float(__builtin_convertvector(load<bytes>(zeros + group * 16 + p * kLanes), vi));
  }
};

// sums [M][16] += a block's 32 columns times M rows of x.
template <int M>
INLINE void accumulate(const float* w, const float* x, int64_t stride, float* sums) {
  constexpr int kChains = M == 1 ? 4 : M == 2 ? 2 : 1;  // sums side by side hide the latency
  vf acc[M][kChains][kParts] = {};
  for (int i = 0; i < kBlock; i += kChains)
    UNROLL
    for (int j = 0; j < kChains; j++)
      UNROLL
      for (int p = 0; p < kParts; p++) {
        vf column = load<vf>(w + (i + j) * 16 + p * kLanes);
        UNROLL
        for (int m = 0; m < M; m++) acc[m][j][p] += column * x[m * stride + i + j];
      }
  UNROLL
  for (int m = 0; m < M; m++)
    UNROLL
    for (int p = 0; p < kParts; p++) {
      UNROLL
      for (int j = 1; j < kChains; j++) acc[m][0][p] += acc[m][j][p];
      float* at = sums + m * 16 + p * kLanes;
      store(at, load<vf>(at) + acc[m][0][p]);
    }
}

void coded_tiles(const Coded& c, int64_t tile0, int64_t tile1) {
  const Linear& a = c.a;
  const Decode f = choose(c);
  alignas(64) float block[kBlock * 16], dots[kMaxRows * 16];
  for (int64_t t = tile0; t < tile1; t++) {
    vf sums[kMaxRows][kParts] = {};
    const Tile tile(c, t);
    for (int64_t g = 0; g < a.groups; g++) {
      const int64_t end = min((g + 1) * a.group, a.kpad);
      memset(dots, 0, a.m * 64);
      for (int64_t k = g * a.group; k < end; k += kBlock) {
        tile.decode(c, f, k / kBlock, g, block);
        int64_t m = 0;
        for (; m + 4 <= a.m; m += 4)
          accumulate<4>(block, a.x + m * a.kpad + k, a.kpad, dots + m * 16);
        for (; m + 2 <= a.m; m += 2)
          accumulate<2>(block, a.x + m * a.kpad + k, a.kpad, dots + m * 16);
        if (m < a.m) accumulate<1>(block, a.x + m * a.kpad + k, a.kpad, dots + m * 16);
      }
      for (int p = 0; p < kParts; p++) {
        const vf scale = tile.scale(c, g, p), zero = tile.zero(g, p);
        for (int64_t m = 0; m < a.m; m++)
          sums[m][p] += scale * (load<vf>(dots + m * 16 + p * kLanes) -
                                 zero * (c.zeros ? a.group_sum[m * a.groups + g] : 0.0f));
      }
    }
    for (int64_t m = 0; m < a.m; m++) {
      if (a.xs)
        for (int p = 0; p < kParts; p++) sums[m][p] *= a.xs[m];
      finish(a, m, t * 16, sums[m]);
    }
  }
}

void coded_widen(const Coded& c, int64_t tile0, int64_t tile1, int64_t stride, float* out) {
  const Decode f = choose(c);
  alignas(64) float block[kBlock * 16];
  for (int64_t t = tile0; t < tile1; t++) {
    const Tile tile(c, t);
    for (int64_t k = 0; k < c.a.kpad; k += kBlock) {
      const int64_t g = k / c.a.group;
      tile.decode(c, f, k / kBlock, g, block);
      for (int p = 0; p < kParts; p++) {
        const vf scale = tile.scale(c, g, p), zero = tile.zero(g, p);
        for (int i = 0; i < kBlock; i++)
          store(out + (k + i) * stride + (t - tile0) * 16 + p * kLanes,
                (load<vf>(block + i * 16 + p * kLanes) - zero) * scale);
      }
    }
  }
}

// Symmetric: q = round(x / s), s = max(amax / 127, 1e-5). Asymmetric: s = (high - low) / 255 with
// low <= 0 <= high, z = -128 - round(low / s); what is left in x is clamp(round(x / s) + z) - z.
void round_rows(float* x, int64_t m, int64_t k, int64_t kpad, int mode, float* scales) {
  for (int64_t r = 0; r < m; r++, x += kpad) {
    vf low{}, high{};
    for (int64_t i = 0; i < kpad; i += kLanes) {
      vf v = load<vf>(x + i);
      low = v < low ? v : low;
      high = max(high, v);
    }
    const float least = -max_of(-low), most = max_of(high);
    float scale, bottom = -127, top = 127;
    if (mode == 1) {
      scale = max(max(-least, most) / 127, 1e-5f);
    } else {
      scale = max((most - least) / 255, 1.1920929e-7f);
      // of vectors, so that it rounds as they do
      const float zero = to_float(round_to_int(splat(least) / splat(scale)))[0];
      bottom = max(zero, -255.0f);
      top = bottom + 255;
    }
    for (int64_t i = 0; i < kpad; i += kLanes) {
      vf q = to_float(round_to_int(load<vf>(x + i) / splat(scale)));
      q = q < bottom ? splat(bottom) : q > top ? splat(top) : q;
      store(x + i, q);
    }
    scales[r] = scale;
  }
}

}  // namespace CPU_LEVEL
