// y = x W^T with n-bit codes, w = (value(code) - zero) * scale: integers, small floats, a codebook.
//
// Tile t holds output rows 16 t .. 16 t + 15, its codes as coded.h says.
// 32 columns at a time are widened into a block of fp32 that stays in the L1 cache, and every
// row of x meets it there.
// With zeros, sum x w = scale * (sum x value - zero * sum x) over each group.
#include "coded.h"

namespace CPU_LEVEL {

// The bits of v, moved from bit `from` to bit `to`.
INLINE vu moved(vu v, int from, int to) {
  return to == from ? v : to < from ? v >> (from - to) : v << (to - from);
}

// Code `i` of a block, its lowest bit at bit `to`; around it anything.
template <int Bits, int i>
INLINE vu code(const uint32_t* words, int p, int to) {
  return moved(four_codes<Bits, i / 4>(words, p), i % 4 * 8, to);
}

INLINE vf smaller(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Integers, small floats, a free table of 16 values.
enum Kind { kInteger, kFloat, kTable };

// What a code of `Bits` bits stands for; of a small float, 1 sign, E exponent, M mantissa bits.
// All constants are held here so that they stay in registers: stores of values could change `c`.
template <Kind kind, int Bits, int E = 0>
struct Value {
#if defined(__AVX512F__)
  // A table in registers: everything up to 5 bits, of 6-bit floats the 32 magnitudes.
  static constexpr bool kLookup = Bits <= 5 || (kind == kFloat && Bits == 6);
  __m512 low, high;
#else
  static constexpr bool kLookup = kind == kTable;
  vf low, high;
#endif
  static constexpr int M = Bits - 1 - E;
  static constexpr float factor() {
    if constexpr (kind == kFloat && !kLookup) return SmallFloat<E>::kFactor;
    return 1;
  }
  float from;
  const float* table;

  explicit Value(const Coded& c) : from(8388608 - c.table[0]), table(c.table) {
#if defined(__AVX512F__)
    low = _mm512_loadu_ps(c.table);
    high = _mm512_loadu_ps(c.table + 16);
#elif defined(__AVX2__)
    low = load<vf>(c.table);
    high = load<vf>(c.table + 8);
#endif
  }

  INLINE vf lookup(vu v) const {
#if defined(__AVX512F__)
    if constexpr (Bits <= 4) return _mm512_permutexvar_ps((__m512i)v, low);
    vf out = _mm512_permutex2var_ps(low, (__m512i)v, high);
    if constexpr (Bits == 6) out = (vf)((vu)out ^ ((v << 26) & 0x80000000u));
    return out;
#elif defined(__AVX2__)
    __m256 a = _mm256_permutevar8x32_ps(low, (__m256i)v);
    __m256 b = _mm256_permutevar8x32_ps(high, (__m256i)v);
    return _mm256_blendv_ps(a, b, (__m256)(v << 28));
#else
    vf out;
    for (int j = 0; j < kLanes; j++) out[j] = table[v[j] & 15];
    return out;
#endif
  }

  // The bits move to their place in fp32, under an exponent that keeps subnormals normal: n. Of a
  // true subnormal the leading one, which n has and it has not, goes: 2 n - (its smallest normal).
  // For all others that is larger than n, so the smaller of the two is right.
  template <int i>
  INLINE vf small_float(const uint32_t* words, int p) const {
    constexpr uint32_t mask = ((1u << (E + M)) - 1) << (23 - M), kBase = SmallFloat<E>::kBase;
    vf n = (vf)blend(code<Bits, i>(words, p, 23 - M), mask, vu{} + (kBase << 23));
    n = smaller(n, n * 2.0f - (vf)(vu{} + ((kBase + 1) << 23)));
    return (vf)blend(code<Bits, i>(words, p, 32 - Bits), 0x80000000u, (vu)n);
  }

  // Of code `i` of a block, part p of its rows.
  template <int i>
  INLINE vf at(const uint32_t* words, int p) const {
    if constexpr (kLookup) return lookup(code<Bits, i>(words, p, 0));
    else if constexpr (kind == kFloat) return small_float<i>(words, p);
    else  // the last bits of 2^23 + code
      return (vf)blend(code<Bits, i>(words, p, 0), 255, vu{} + 0x4b000000u) - from;
  }
};

// The 32 columns of a block as fp32 values: column i of row r at out[16 i + r].
struct Decoder {
  void (*block)(const Coded&, const uint32_t* words, const uint32_t* positions, float* out);
  // sums [16] += so many blocks times one row of x: nothing passes through memory
  void (*dot)(const Coded&, const uint32_t* words, const uint32_t* positions, int64_t blocks,
              const float* x, float* sums);
  float factor;
};

template <Kind kind, int Bits, int E = 0>
static void decode(const Coded& c, const uint32_t* words, const uint32_t*, float* out) {
  const Value<kind, Bits, E> value(c);
  unrolled<0, kBlock / 4>([&](auto q) __attribute__((always_inline)) {
    constexpr int i = 4 * q.value;
    for (int p = 0; p < kParts; p++) {
      const vf four[] = {value.template at<i>(words, p), value.template at<i + 1>(words, p),
                         value.template at<i + 2>(words, p), value.template at<i + 3>(words, p)};
      UNROLL
      for (int j = 0; j < 4; j++) store(out + (i + j) * 16 + p * kLanes, four[j]);
    }
  });
}

INLINE void add_to(float* sums, int p, vf a, vf b, vf c, vf d) {
  store(sums + p * kLanes, load<vf>(sums + p * kLanes) + ((a + b) + (c + d)));
}

// The codes that are read next but a few.
INLINE void ask(const uint32_t* words, int lines) {
  constexpr int kAhead = 2048 / 4;
  UNROLL
  for (int i = 0; i < lines; i++) prefetch(words + kAhead + i * 16);
}

#if defined(__AVX512F__)
// `dot` of 8-bit floats, E < 5: a byte shifted to the top of 16 bits, its exponent then right by
// 5 - E, is an fp16 number off by a power of two, subnormals too. Two columns of each row lie side
// by side in the lanes of 16 bits, so the lanes of an accumulator alternate between two columns.
template <int E>
INLINE void dot_float8(const uint32_t* words, int64_t blocks, const float* x, float* sums) {
  const __m512i mask = _mm512_set1_epi16(int16_t(0x8000 | 0x7F00 >> (5 - E)));
  __m512 acc[2][2] = {};  // [columns 0 and 2, 1 and 3][rows 0 to 7, 8 to 15]
  for (int64_t word = 0; word < blocks * (kBlock / 4); word++) {
    ask(words + word * 16, 1);
    const __m512i v = _mm512_loadu_si512(words + word * 16);
    const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(x + 4 * word));
    const __m512 columns[] = {_mm512_permute_ps(four, 0x88), _mm512_permute_ps(four, 0xDD)};
    const __m512i bytes[] = {_mm512_slli_epi16(v, 8), v};
    UNROLL
    for (int odd = 0; odd < 2; odd++) {
      const __m512i half = _mm512_and_si512(_mm512_srai_epi16(bytes[odd], 5 - E), mask);
      const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
      const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
      acc[odd][0] = _mm512_fmadd_ps(low, columns[odd], acc[odd][0]);
      acc[odd][1] = _mm512_fmadd_ps(high, columns[odd], acc[odd][1]);
    }
  }
  const __m512 low = acc[0][0] + acc[1][0], high = acc[0][1] + acc[1][1];
  const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 even = _mm512_permutex2var_ps(low, first, high);
  const __m512 odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(1)), high);
  constexpr float power = float(1 << (15 - SmallFloat<E>::kBias));
  store(sums, load<vf>(sums) + (vf)(even + odd) * (power / SmallFloat<E>::kFactor));
}
#endif

template <Kind kind, int Bits, int E = 0>
static void dot(const Coded& c, const uint32_t* words, const uint32_t*, int64_t blocks,
                const float* x, float* sums) {
#if defined(__AVX512F__)
  if constexpr (kind == kFloat && Bits == 8 && E < 5) return dot_float8<E>(words, blocks, x, sums);
#endif
  const Value<kind, Bits, E> value(c);
  vf acc[kParts][4] = {};
  for (int64_t b = 0; b < blocks; b++, words += Bits * 16, x += kBlock) {
    ask(words, Bits);
    for (int p = 0; p < kParts; p++)
      unrolled<0, kBlock>([&](auto i) __attribute__((always_inline)) {
        acc[p][i.value % 4] += value.template at<i.value>(words, p) * x[i.value];
      });
  }
  for (int p = 0; p < kParts; p++) add_to(sums, p, acc[p][0], acc[p][1], acc[p][2], acc[p][3]);
}

// Of 2:4 codes `which` (0 or 1) of columns 4 q .. 4 q + 3 of a block of columns: its number, and its place
// among the four, above which there is anything. In planes (coded.h).
template <int q, int which>
INLINE vf kept(const uint32_t* words, int p) {
  constexpr int step = q / 2, bit = q % 2 * 16 + which * 8 + step % 2 * 4;
  return to_float((vi)moved(load<vu>(words + step / 2 * 16 + p * kLanes), bit, 28) >> 28);
}
template <int q, int which>
INLINE vu place(const uint32_t* positions, int p) {
  return moved(load<vu>(positions + p * kLanes), q % 2 * 16 + which * 8 + q / 2 * 2, 0);
}

static void decode_sparse(const Coded& c, const uint32_t* words, const uint32_t* positions,
                          float* out) {
  unrolled<0, kBlock / 4>([&](auto q) __attribute__((always_inline)) {
    for (int p = 0; p < kParts; p++) {
      const vi first = (vi)(place<q.value, 0>(positions, p) & 3);
      const vi second = (vi)(place<q.value, 1>(positions, p) & 3);
      const vf a = kept<q.value, 0>(words, p), b = kept<q.value, 1>(words, p);
      UNROLL
      for (int j = 0; j < 4; j++) {
        vf none{};
        vf v = second == j ? b : (first == j ? a : none);
        store(out + (4 * q.value + j) * 16 + p * kLanes, v);
      }
    }
  });
}

// Element v % 4 of x [4] in each lane.
INLINE vf pick4(const float* x, vu v) {
#if defined(__AVX512F__)
  return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(x)), (__m512i)v);
#elif defined(__AVX2__)
  return _mm256_permutevar_ps(_mm256_broadcast_ps((const __m128*)x), (__m256i)v);
#else
  vf out;
  for (int j = 0; j < kLanes; j++) out[j] = x[v[j] & 3];
  return out;
#endif
}

static void dot_sparse(const Coded& c, const uint32_t* words, const uint32_t* positions,
                       int64_t blocks, const float* x, float* sums) {
  vf acc[kParts][4] = {};
  for (int64_t b = 0; b < blocks; b++, words += 2 * 16, positions += 16, x += kBlock) {
    ask(words, 2);
    ask(positions, 1);
    for (int p = 0; p < kParts; p++)
      unrolled<0, kBlock / 4>([&](auto q) __attribute__((always_inline)) {
        constexpr int i = q.value % 2 * 2;
        const float* four = x + 4 * q.value;
        acc[p][i] += kept<q.value, 0>(words, p) * pick4(four, place<q.value, 0>(positions, p));
        acc[p][i + 1] += kept<q.value, 1>(words, p) * pick4(four, place<q.value, 1>(positions, p));
      });
  }
  for (int p = 0; p < kParts; p++) add_to(sums, p, acc[p][0], acc[p][1], acc[p][2], acc[p][3]);
}

template <Kind kind, int Bits, int E = 0>
constexpr Decoder kDecoder{decode<kind, Bits, E>, dot<kind, Bits, E>,
                           Value<kind, Bits, E>::factor()};
template <int E, int M>
constexpr Decoder kSmallFloat = kDecoder<kFloat, 1 + E + M, E>;

static Decoder choose(const Coded& c) {
  if (c.positions) return {decode_sparse, dot_sparse, 1};
  static constexpr Decoder none{nullptr, nullptr, 0};
  static constexpr Decoder integers[] = {
      kDecoder<kInteger, 1>, kDecoder<kInteger, 2>, kDecoder<kInteger, 3>, kDecoder<kInteger, 4>,
      kDecoder<kInteger, 5>, kDecoder<kInteger, 6>, kDecoder<kInteger, 7>};
  static constexpr Decoder floats[4][5] = {  // [E - 2][M - 1]
      {kSmallFloat<2, 1>, kSmallFloat<2, 2>, kSmallFloat<2, 3>, kSmallFloat<2, 4>,
       kSmallFloat<2, 5>},
      {kSmallFloat<3, 1>, kSmallFloat<3, 2>, kSmallFloat<3, 3>, kSmallFloat<3, 4>, none},
      {kSmallFloat<4, 1>, kSmallFloat<4, 2>, kSmallFloat<4, 3>, none, none},
      {kSmallFloat<5, 1>, kSmallFloat<5, 2>, none, none, none}};
  if (c.exponent_bits) return floats[c.exponent_bits - 2][c.bits - c.exponent_bits - 2];
  return c.integers ? integers[c.bits - 1] : kDecoder<kTable, 4>;
}

static void decode(const Coded& c, const Decoder& f, const Tile& tile, int64_t block, float* out) {
  f.block(c, tile.codes + block * Tile::words(c) * 16,
          tile.positions ? tile.positions + block * 16 : nullptr, out);
}

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
  const Decoder f = choose(c);
  alignas(64) float block[kBlock * 16], dots[kFewRows * 16];
  for (int64_t t = tile0; t < tile1; t++) {
    vf sums[kFewRows][kParts] = {};
    const Tile tile(c, t);
    for (int64_t g = 0; g < a.groups; g++) {
      const int64_t end = min((g + 1) * a.group, a.kpad);
      memset(dots, 0, a.m * 64);
      if (a.m == 1) {
        const int64_t at = g * a.group / kBlock;
        f.dot(c, tile.codes + at * Tile::words(c) * 16,
              tile.positions ? tile.positions + at * 16 : nullptr, (end + kBlock - 1) / kBlock - at,
              a.x + g * a.group, dots);
      }
      for (int64_t k = g * a.group; a.m > 1 && k < end; k += kBlock) {
        decode(c, f, tile, k / kBlock, block);
        int64_t m = 0;
        for (; m + 4 <= a.m; m += 4)
          accumulate<4>(block, a.x + m * a.kpad + k, a.kpad, dots + m * 16);
        for (; m + 2 <= a.m; m += 2)
          accumulate<2>(block, a.x + m * a.kpad + k, a.kpad, dots + m * 16);
        if (m < a.m) accumulate<1>(block, a.x + m * a.kpad + k, a.kpad, dots + m * 16);
      }
      for (int p = 0; p < kParts; p++) {
        const vf scale = tile.scale(c, g, p) * f.factor, zero = tile.zero(g, p);
        for (int64_t m = 0; m < a.m; m++)
          sums[m][p] += scale * (load<vf>(dots + m * 16 + p * kLanes) -
                                 zero * (c.zeros ? a.group_sum[g * a.m + m] : 0.0f));
      }
    }
    for (int64_t m = 0; m < a.m; m++) {
      if (a.xs)
        for (int p = 0; p < kParts; p++) sums[m][p] *= a.xs[m];
      finish(a, m, t * 16, sums[m]);
    }
  }
}

// The weight of columns k0 .. k1 in fp32: column k of row r of the tile at out[(k - k0) * stride + r].
void coded_widen(const Coded& c, int64_t t, int64_t k0, int64_t k1, int64_t stride, float* out) {
  const Decoder f = choose(c);
  const Tile tile(c, t);
  alignas(64) float block[kBlock * 16];
  for (int64_t k = k0; k < k1; k += kBlock) {
    const int64_t g = min(k / c.a.group, c.a.groups - 1);
    decode(c, f, tile, k / kBlock, block);
    for (int p = 0; p < kParts; p++) {
      const vf scale = tile.scale(c, g, p) * f.factor, zero = tile.zero(g, p);
      for (int i = 0; i < kBlock; i++)
        store(out + (k - k0 + i) * stride + p * kLanes,
              (load<vf>(block + i * 16 + p * kLanes) - zero) * scale);
    }
  }
}

// The nearest e4m3 number of |x| <= 448, ties to even. Its last bit is worth 1/8 of x's power of two,
// but no less than 2^-9; 1.5 * 2^23 times that leaves a sum no room for smaller bits.
INLINE vf to_e4m3(vf x) {
  const vu least = vu{} + (121u << 23);  // 2^-6
  vu power = (vu)x & 0x7f800000u;
  power = power > least ? power : least;
  const vf magic = (vf)((power + (20u << 23)) | 0x00400000u);
  return (x + magic) - magic;
}

// Rows that share one scale s = max(amax / 448, 1e-12) to e4m3.
static void round_float8(float* x, int64_t m, int64_t kpad, float* scales) {
  Range range;
  for (int64_t i = 0; i < m * kpad; i += kLanes) range.add(load<vf>(x + i));
  const float scale = at_least(range.magnitude() / 448, 1e-12f);
  for (int64_t i = 0; i < m * kpad; i += kLanes) {
    vf q = load<vf>(x + i) / splat(scale);
    q = q < -448.0f ? splat(-448.0f) : q > 448.0f ? splat(448.0f) : q;
    store(x + i, to_e4m3(q));
  }
  for (int64_t r = 0; r < m; r++) scales[r] = scale;
}

// Mode 1: s = (high - low) / 255 with low <= 0 <= high, z = -128 - round(low / s); what is left in x
// is clamp(round(x / s) + z) - z.
void round_rows(float* x, int64_t m, int64_t kpad, int mode, float* scales) {
  if (mode == 3) return round_float8(x, m, kpad, scales);
  if (mode == 2) {
    for (int64_t r = 0; r < m; r++) round_float8(x + r * kpad, 1, kpad, scales + r);
    return;
  }
  for (int64_t r = 0; r < m; r++, x += kpad) {
    Range range;
    for (int64_t i = 0; i < kpad; i += kLanes) range.add(load<vf>(x + i));
    const float scale = range.scale(), bottom = float(range.bottom(scale)), top = bottom + 255;
    for (int64_t i = 0; i < kpad; i += kLanes) {
      vf q = to_float(round_to_int(load<vf>(x + i) / splat(scale)));
      q = q < bottom ? splat(bottom) : q > top ? splat(top) : q;
      store(x + i, q);
    }
    scales[r] = scale;
  }
}

}  // namespace CPU_LEVEL
