// y = x (q s)^T: int8 weights in tiles, one scale per row.
//
// Tile t holds output rows 16 t .. 16 t + 15; four columns of all 16 rows lie together in 64 bytes,
// as unsigned bytes q + 128: the form of the VNNI product of unsigned and signed bytes. With
// x ~ xs * xq in blocks of columns: sum x q = sum over blocks of xs * (xq . (q + 128) - 128 sum xq).
// Weight-only, xq has 16 bits, two int8 products where these are one instruction: of a block's largest
// number, which bf16 knows to 2^-9, it is off by at most 2^-16, and reading the weight takes longer than
// both products.
#include "level.h"

namespace CPU_LEVEL {

// The largest magnitude, compared as bits: a NaN counts as the largest.
INLINE float amax(const float* p, int64_t len) {
  vi top{};
  for (int64_t i = 0; i < len; i += kLanes) {
    const vi v = load<vi>(p + i) & 0x7fffffff;
    top = v > top ? v : top;
  }
  return ((vf)splat(max_of(top)))[0];
}

// len numbers at p to codes; returns the codes' sum. len is rounded up to whole vectors. A format's
// own codes are exact: divided. Where an inverse will do, it saves half of the time.
template <bool kExact>
INLINE int32_t round_line(const float* p, int64_t len, float scale, int8_t* codes) {
  vi sums{};
  const vf by = splat(scale > 1e-36f ? kExact ? scale : 1 / scale : 1.0f);
  for (int64_t i = 0; i < len; i += kLanes) {
    vi q = round_to_int(kExact ? load<vf>(p + i) / by : load<vf>(p + i) * by);
    sums += q;
    store8(codes + i, q);
  }
  return sum(sums);
}

// kPairBlock numbers at p to 16 bits, in the form of four_of(); returns the codes' sum.
INLINE int32_t round_pairs(const float* p, float scale, int8_t* out) {
  vi sums{};
  const vf by = splat(scale > 1e-36f ? 1 / scale : 1.0f);
  int8_t *high = out, *low = out + kPairBlock;
  for (int64_t i = 0; i < kPairBlock; i += kLanes) {
    const vi q = round_to_int(load<vf>(p + i) * by), top = (q + 128) >> 8;
    sums += q;
    if (kVnni) {
      store8(high + i, top);
      store8(low + i, q - (top << 8));
    } else {
      store16(out + 2 * i, (vu)q);
    }
  }
  for (int64_t i = 0; !kVnni && i < 2 * kPairBlock; i += 8) {  // of four the middle two change places
    uint64_t four;
    memcpy(&four, out + i, 8);
    four = (four & 0xffff00000000ffff) | (four & 0xffff0000) << 16 | (four >> 16 & 0xffff0000);
    memcpy(out + i, &four, 8);
  }
  return sum(sums);
}

// Rows m0 .. m1 of x in pairs.
static void pair_rows(const void* x, const Linear& a, const Quantized& out, int64_t m0, int64_t m1) {
  alignas(64) float values[2 * kPairBlock];
  alignas(64) int8_t codes[2 * kPairBlock];
  const int64_t size = a.type == Type::fp32 ? 4 : 2;
  for (int64_t m = m0; m < m1; m++)
    for (int64_t k = 0, b = m; k < a.kpad; k += a.block, b += a.m) {
      const int64_t len = min(a.block, a.kpad - k);
      widen_rows((const char*)x + (m * a.k + k) * size, a.type, 1, min(len, a.k - k), kPairBlock,
                 false, values);  // zeros after the row's end
      out.xs[b] = a.xs ? a.xs[m] : amax(values, kPairBlock) / 32512;
      const int32_t total = round_pairs(values, a.xs ? 1 : out.xs[b], codes);
      out.offset[b] = -out.zero_code * total;
      if (out.group_sum) {
        float& sum = out.group_sum[k / a.group * a.m + m];
        sum = (k % a.group ? sum : 0) + out.xs[b] * float(total);
      }
      if (kVnni) {
        memcpy(out.xq + m * a.kpad + k, codes, len);
        memcpy(out.xq + (a.m + m) * a.kpad + k, codes + kPairBlock, len);
      } else {
        memcpy(out.xq + 2 * (m * a.kpad + k), codes, 2 * len);
      }
    }
}

// Quantize rows m0 .. m1 of x, in blocks (or whole rows: block = kpad), kChunk columns at a time.
void quantize_rows(const void* x, const Linear& a, const Quantized& out, int64_t m0, int64_t m1) {
  if (out.rounding == Rounding::pairs) return pair_rows(x, a, out, m0, m1);
  if (out.rounding > Rounding::token) return unsigned_rows(x, a, out, m0, m1);
  constexpr int64_t kChunk = 2048;
  alignas(64) float values[kChunk + 64];
  alignas(64) int8_t codes[kChunk + 64];
  const int64_t size = a.type == Type::fp32 ? 4 : 2;
  for (int64_t m = m0; m < m1; m++) {
    // Columns k0 .. k0 + len as fp32, zeros after the row's end.
    auto widen = [&](int64_t k0, int64_t len) {
      const int64_t real = k0 < a.k ? min(len, a.k - k0) : 0;
      widen_rows((const char*)x + (m * a.k + k0) * size, a.type, 1, real, len + 64, false, values);
    };
    if (out.rounding == Rounding::token) {
      float top = 0;
      for (int64_t k = 0; k < a.kpad; k += kChunk) {
        widen(k, min(kChunk, a.kpad - k));
        top = larger(top, amax(values, min(kChunk, a.kpad - k)));
      }
      const float scale = at_least(top / 127, 1e-5f);  // a NaN's makes all of the row's results NaN
      int32_t total = 0;
      for (int64_t k = 0; k < a.kpad; k += kChunk) {
        const int64_t len = min(kChunk, a.kpad - k);
        if (a.kpad > kChunk) widen(k, len);
        total += round_line<true>(values, len, scale, codes);
        memcpy(out.xq + m * a.kpad + k, codes, len);
      }
      out.xs[m] = scale;
      out.offset[m] = -out.zero_code * total;
      continue;
    }
    const int64_t chunk = kChunk / a.block * a.block;
    for (int64_t k = 0; k < a.kpad; k += chunk) {
      const int64_t len = min(chunk, a.kpad - k);
      widen(k, len);
      for (int64_t i = 0; i < len; i += a.block) {
        const int64_t b = (k + i) / a.block * a.m + m;
        const int64_t width = min(a.block, len - i);
        const float* from = values + i;
        alignas(64) float line[64] = {};
        if (width % kLanes)  // the neighbours' numbers must not count
          from = (const float*)memcpy(line, from, width * sizeof(float));
        const float scale = out.xs[b] = amax(from, width) / 127;
        const int32_t total = round_line<false>(from, width, scale, codes + i);
        out.offset[b] = -out.zero_code * total;
        if (out.group_sum) {
          float& sum = out.group_sum[(k + i) / a.group * a.m + m];
          sum = (k + i) % a.group ? sum + scale * float(total) : scale * float(total);
        }
      }
      memcpy(out.xq + m * a.kpad + k, codes, len);
    }
  }
}

// M rows of x against T tiles: int8 activations, or kPairs 16 bits of them.
template <int M, int T, bool kPairs>
static void quantized(const Linear& a, int64_t tile, int64_t m0) {
  vf sums[M][T][kParts] = {};
  const uint8_t* w = (const uint8_t*)a.w + tile * a.kpad * 16;
  const int64_t ahead = M == kRows && m0 ? 0 : T;  // tiles; many rows ask for them once
  const int8_t* xq = a.xq + m0 * a.kpad;
  for (int64_t b = 0; b < a.blocks; b++) {
    vi dots[M][T][kParts], tops[M][T][kParts] = {};
    start_dots(a, b, m0, dots);
    int64_t end = min((b + 1) * a.block, a.kpad);
    _Pragma("GCC unroll 4")
    for (int64_t k = b * a.block; k < end; k += 4) {
      vi wv[T][kParts];
      UNROLL
      for (int t = 0; t < T; t++)
        UNROLL
        for (int p = 0; p < kParts; p++) {
          wv[t][p] = load<vi>(w + (t * a.kpad + k) * 16 + p * kLanes * 4);
          if (p == 0) prefetch(w + ((t + ahead) * a.kpad + k) * 16);
        }
      UNROLL
      for (int m = 0; m < M; m++) {
        int32_t four;
        memcpy(&four, xq + m * a.kpad + k, 4);
        const Four pair = kPairs ? four_of(a, m0 + m, k) : Four{};
        UNROLL
        for (int t = 0; t < T; t++)
          UNROLL
          for (int p = 0; p < kParts; p++) {
            if (kPairs) add_dot(tops[m][t][p], dots[m][t][p], wv[t][p], pair);
            else dots[m][t][p] = dot4(dots[m][t][p], wv[t][p], splat(four));
          }
      }
    }
    UNROLL
    for (int m = 0; m < M; m++)
      UNROLL
      for (int t = 0; t < T; t++)
        UNROLL
        for (int p = 0; p < kParts; p++) {
          const vi whole = kPairs ? (tops[m][t][p] << 8) + dots[m][t][p] : dots[m][t][p];
          sums[m][t][p] += to_float(whole) * a.xs[b * a.m + m0 + m];
        }
  }
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) finish(a, m0 + m, (tile + t) * 16, sums[m][t]);
}

// Byte i of each lane, a signed number, times 2^24: an operation less than the number itself.
INLINE vf byte_on_top(vi v, int i) {
#if defined(__AVX512F__)
  if (i == 1 || i == 2) {  // -1: zero
    const __m128i from = _mm_setr_epi8(-1, -1, -1, char(i), -1, -1, -1, char(i + 4),
                                       -1, -1, -1, char(i + 8), -1, -1, -1, char(i + 12));
    return to_float((vi)_mm512_shuffle_epi8((__m512i)v, _mm512_broadcast_i32x4(from)));
  }
#endif
  return to_float((v << (24 - 8 * i)) & int32_t(0xff000000));
}

// M rows of x, times kByteOnTop, against T tiles: fp32 activations, weights widened in registers.
template <int M, int T>
static void exact(const Linear& a, int64_t tile, int64_t m0) {
  vf sums[M][T][kParts] = {}, more[M][T][kParts] = {};
  const uint8_t* w = (const uint8_t*)a.w + tile * a.kpad * 16;
  const float* x = a.x + m0 * a.kpad;
  for (int64_t k = 0; k < a.kpad; k += 4)
    UNROLL
    for (int t = 0; t < T; t++)
      UNROLL
      for (int p = 0; p < kParts; p++) {
        vi v = load<vi>(w + (t * a.kpad + k) * 16 + p * kLanes * 4) ^ int32_t(0x80808080);
        if (p == 0) prefetch(w + ((t + T) * a.kpad + k) * 16);
        UNROLL
        for (int i = 0; i < 4; i++) {
          vf q = byte_on_top(v, i);
          UNROLL
          for (int m = 0; m < M; m++) {
            vf& into = M == 1 && i % 2 ? more[m][t][p] : sums[m][t][p];
            into += q * x[m * a.kpad + k + i];
          }
        }
      }
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) {
      UNROLL
      for (int p = 0; p < kParts; p++) sums[m][t][p] += more[m][t][p];
      finish(a, m0 + m, (tile + t) * 16, sums[m][t]);
    }
}

void int8_tiles(const Linear& a, int64_t t0, int64_t t1) {
  each_tile<kRows>(t0, t1, 0, a.m, [&](auto m, auto t, int64_t tile, int64_t row) {
    quantized<m.value, t.value, false>(a, tile, row);
  });
}

void int8_pairs(const Linear& a, int64_t t0, int64_t t1) {
  each_tile<kExactRows>(t0, t1, 0, a.m, [&](auto m, auto t, int64_t tile, int64_t row) {
    quantized<m.value, t.value, true>(a, tile, row);
  });
}

void int8_exact(const Linear& a, int64_t t0, int64_t t1) {
  each_tile<kExactRows>(t0, t1, 0, a.m, [&](auto m, auto t, int64_t tile, int64_t row) {
    exact<m.value, t.value>(a, tile, row);
  });
}

// The codes q as fp32; the scales are applied to the sums.
void int8_panel(const Linear& a, int64_t tile, int64_t k0, int64_t k1, float* out) {
  const uint8_t* w = (const uint8_t*)a.w + tile * a.kpad * 16;
  for (int64_t k = k0; k < k1; k += 4)
    for (int p = 0; p < kParts; p++) {
      vi v = load<vi>(w + k * 16 + p * kLanes * 4) ^ int32_t(0x80808080);
      UNROLL
      for (int i = 0; i < 4; i++)
        store(out + (k - k0 + i) * kPanelWidth + p * kLanes, to_float((v << (24 - 8 * i)) >> 24));
    }
}

}  // namespace CPU_LEVEL
