// y = x W^T with 2:4 codes, w = code * scale; x in 16 bits.
//
// Each code meets its own column of x, which a byte permutation takes out of eight. VNNI multiplies
// unsigned with signed bytes: x is the unsigned one, its bytes plus 128, so that with xq = 256 high + low
//   xq . code = 256 (high + 128) . code + (low + 128) . code - 128 (256 + 1) sum code
// Codes stay in the upper halves of their bytes, times 16.
#include "coded.h"

namespace CPU_LEVEL {

#if defined(__AVX512BW__)
// Four codes of each row, of columns 8 step .. 8 step + 7 of a block of columns.
template <int step>
INLINE vi four_kept(const uint32_t* codes) {
  const vu v = load<vu>(codes + step / 2 * 16);
  return (vi)((step % 2 ? v : v << 4) & 0xf0f0f0f0u);
}

// Where they are among the eight.
template <int step>
INLINE vu places(const uint32_t* positions) {
  return blend(load<vu>(positions) >> (2 * step), 0x03030303u, vu{} + 0x04040000u);
}

// Of eight bytes at x those at `places`.
INLINE vi picked(const int8_t* x, vu places) {
  int64_t eight;
  memcpy(&eight, x, 8);
  return (vi)_mm512_shuffle_epi8(_mm512_set1_epi64(eight), (__m512i)places);
}

// M rows of x against T tiles.
template <int M, int T>
static void pairs(const Coded& c, int64_t tile, int64_t m0) {
  const Linear& a = c.a;
  const int8_t *high = a.xq + m0 * a.kpad, *low = high + a.m * a.kpad;
  const Tile tiles[] = {Tile(c, tile), Tile(c, tile + T - 1)};
  const int64_t stride = a.kpad / kBlock * 16;
  vf sums[M][T] = {};
  int64_t b = 0;
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t end = min((g + 1) * a.group, a.kpad);
    for (int64_t k0 = g * a.group; k0 < end; k0 += a.block, b++) {
      vi dots[M][T] = {}, tops[M][T] = {}, total[T] = {};
      const int64_t k1 = min(k0 + a.block, end);
      for (int64_t k = k0; k < k1; k += kBlock) {
        UNROLL
        for (int t = 0; t < T; t++) {
          const uint32_t* codes = tiles[t].codes + k / kBlock * 2 * 16;
          const uint32_t* positions = tiles[t].positions + k / kBlock * 16;
          prefetch(codes + T * stride * 2);
          prefetch(codes + T * stride * 2 + 16);
          prefetch(positions + T * stride);
          unrolled<0, kBlock / 8>([&](auto step) __attribute__((always_inline)) {
            const vi four = four_kept<step.value>(codes);
            const vu where = places<step.value>(positions);
            total[t] = dot4(total[t], splat(0x01010101), four);
            UNROLL
            for (int m = 0; m < M; m++) {
              const int64_t at = m * a.kpad + k + 8 * step.value;
              dots[m][t] = dot4(dots[m][t], picked(low + at, where), four);
              tops[m][t] = dot4(tops[m][t], picked(high + at, where), four);
            }
          });
        }
      }
      UNROLL
      for (int t = 0; t < T; t++) {
        const vf scale = tiles[t].scale(c, g, 0);
        UNROLL
        for (int m = 0; m < M; m++) {
          const vi dot = (tops[m][t] << 8) + dots[m][t] - total[t] * (128 * 257);
          sums[m][t] += to_float(dot) * (scale * a.xs[b * a.m + m0 + m]);
        }
      }
    }
  }
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) {
      sums[m][t] *= 1 / 16.0f;
      finish(a, m0 + m, (tile + t) * 16, &sums[m][t]);
    }
}
#endif

void sparse_pairs(const Coded& c, int64_t t0, int64_t t1) {
#if defined(__AVX512BW__)  // elsewhere nothing calls it
  each_tile<kExactRows>(t0, t1, 0, c.a.m, [&](auto m, auto t, int64_t tile, int64_t row) {
    pairs<m.value, t.value>(c, tile, row);
  });
#endif
}

}  // namespace CPU_LEVEL
