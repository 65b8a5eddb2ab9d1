// y = x W^T with codes of n < 8 bits in planes, w = (value(code) - zero) * scale; x in 16 bits.
//
// With x ~ xs * xq in blocks of columns that divide a group, xq of 16 bits (see int8.cpp), and
// value = code - mid,
//   sum x w = sum over groups of scale * (sum over blocks of xs * (xq . code - mid sum xq)
//                                         - zero * sum xs xq)
// Other values are a unit times integers of 16 bits: small floats exactly, a free table as near as 2^-16
// of its largest. Byte permutations look up the low bytes and the high ones, which are a code each.
#include "coded.h"

namespace CPU_LEVEL {

// A byte for each code of `Bits` bits.
template <int Bits>
struct Bytes {
  vi table;  // of 16 bytes, repeated, or of 64

  explicit Bytes(const uint8_t (&bytes)[64]) : table(load<vi>(bytes)) {}
  INLINE vi operator()(vi codes) const {
#if defined(__AVX512VBMI__)
    return (vi)_mm512_permutexvar_epi8((__m512i)codes, (__m512i)table);
#elif defined(__AVX512BW__)
    return (vi)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes);
#elif defined(__AVX2__)
    return (vi)_mm256_shuffle_epi8((__m256i)table, (__m256i)codes);
#else  // nothing calls it
    return codes;
#endif
  }
};

// M rows of x against T tiles.
template <int Bits, bool kLookup, int M, int T>
static void pairs(const Coded& c, int64_t tile, int64_t m0) {
  const Linear& a = c.a;
  const int64_t stride = a.kpad / kBlock * Bits * 16;
  const Tile first(c, tile), last(c, tile + T - 1);
  const Bytes<Bits> low_byte(c.low), high_byte(c.high);
  vf sums[M][T][kParts] = {};
  int64_t b = 0;
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t end = min((g + 1) * a.group, a.kpad);
    for (int64_t k0 = g * a.group; k0 < end; k0 += a.block, b++) {
      // what counts 1, 256 and, of two bytes, 65536
      vi dots[M][T][kParts] = {}, tops[M][T][kParts] = {}, most[M][T][kParts] = {};
      start_dots(a, b, m0, kLookup ? tops : dots);
      const int64_t k1 = min(k0 + a.block, end);
      for (int64_t k = k0; k < k1; k += kBlock) {
        const uint32_t* block = first.codes + k / kBlock * Bits * 16;
        UNROLL
        for (int line = 0; line < Bits * T; line++)
          prefetch(block + T * stride + line % T * stride + line / T * 16);
        unrolled<0, kBlock / 4>([&](auto step) __attribute__((always_inline)) {
          vi codes[T][kParts], upper[T][kParts];
          UNROLL
          for (int t = 0; t < T; t++)
            UNROLL
            for (int p = 0; p < kParts; p++) {
              codes[t][p] = (vi)four_codes<Bits, step.value>(block + t * stride, p);
              if (!kLookup) continue;
              upper[t][p] = high_byte(codes[t][p]);
              codes[t][p] = low_byte(codes[t][p]);
            }
          UNROLL
          for (int m = 0; m < M; m++) {
            const Four x = four_of(a, m0 + m, k + 4 * step.value);
            UNROLL
            for (int t = 0; t < T; t++)
              UNROLL
              for (int p = 0; p < kParts; p++) {
                add_dot(tops[m][t][p], dots[m][t][p], codes[t][p], x);
                if (kLookup) add_dot(most[m][t][p], tops[m][t][p], upper[t][p], x);
              }
          }
        });
      }
      UNROLL
      for (int t = 0; t < T; t++)
        UNROLL
        for (int p = 0; p < kParts; p++) {
          const vf scale = (t ? last : first).scale(c, g, p) * (kLookup ? c.unit : 1);
          UNROLL
          for (int m = 0; m < M; m++) {
            const vi ones = dots[m][t][p], more = tops[m][t][p];
            const vf dot = kLookup ? to_float((most[m][t][p] << 8) + more) * 256.0f + to_float(ones)
                                   : to_float((more << 8) + ones);
            sums[m][t][p] += dot * (scale * a.xs[b * a.m + m0 + m]);
          }
        }
    }
    UNROLL
    for (int t = 0; c.zeros && t < T; t++)
      UNROLL
      for (int p = 0; p < kParts; p++) {
        const vf zero = (t ? last : first).zero(g, p) * (t ? last : first).scale(c, g, p);
        UNROLL
        for (int m = 0; m < M; m++) sums[m][t][p] -= zero * a.group_sum[g * a.m + m0 + m];
      }
  }
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) finish(a, m0 + m, (tile + t) * 16, sums[m][t]);
}

template <int Bits, bool kLookup>
static void all_rows(const Coded& c, int64_t t0, int64_t t1) {
  each_tile<kLookup ? kExactRows : kRows>(t0, t1, 0, c.a.m, [&](auto m, auto t, int64_t tile, int64_t row) {
    pairs<Bits, kLookup, m.value, t.value>(c, tile, row);
  });
}

void plane_pairs(const Coded& c, int64_t t0, int64_t t1) {
  if constexpr (kLanes > 4)  // elsewhere nothing calls it
    unrolled<1, 8>([&](auto bits) {
      if (c.bits != bits.value) return;
      if (c.integers) all_rows<bits.value, false>(c, t0, t1);
      else if constexpr (bits.value >= 4 && bits.value <= kLookupBits)
        all_rows<bits.value, true>(c, t0, t1);
    });
}

}  // namespace CPU_LEVEL
