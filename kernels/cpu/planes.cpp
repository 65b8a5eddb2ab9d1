// y = x W^T with integers of n < 8 bits in planes, w = (code - zero) * scale; x in pairs of int8.
//
// With x ~ xs * xq in blocks of columns that divide a group, xq of 16 bits (see int8.cpp) and `mid`
// what all codes are lowered by,
//   sum x w = sum over groups of scale * (sum over blocks of xs * (xq . code - mid sum xq)
//                                         - zero * sum xs xq)
#include "coded.h"

namespace CPU_LEVEL {

// M rows of x against T tiles.
template <int Bits, int M, int T>
static void pairs(const Coded& c, int64_t tile, int64_t m0) {
  const Linear& a = c.a;
  const int8_t *high = a.xq + m0 * a.kpad, *low = high + a.m * a.kpad;
  const int64_t stride = a.kpad / kBlock * Bits * 16;
  const Tile first(c, tile), last(c, tile + T - 1);
  vf sums[M][T][kParts] = {};
  int64_t b = 0;
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t end = min((g + 1) * a.group, a.kpad);
    for (int64_t k0 = g * a.group; k0 < end; k0 += a.block, b++) {
      vi dots[M][T][kParts], tops[M][T][kParts] = {};
      start_dots(a, b, m0, dots);
      const int64_t k1 = min(k0 + a.block, end);
      for (int64_t k = k0; k < k1; k += kBlock) {
        const uint32_t* block = first.codes + k / kBlock * Bits * 16;
        UNROLL
        for (int line = 0; M < kRows && line < Bits * T; line++)
          prefetch(block + T * stride + line % T * stride + line / T * 16);
        unrolled<0, kBlock / 4>([&](auto step) __attribute__((always_inline)) {
          vi codes[T][kParts];
          UNROLL
          for (int t = 0; t < T; t++)
            UNROLL
            for (int p = 0; p < kParts; p++)
              codes[t][p] = (vi)four_codes<Bits, step.value>(block + t * stride, p);
          UNROLL
          for (int m = 0; m < M; m++) {
            int32_t four[2];
            memcpy(&four[0], low + m * a.kpad + k + 4 * step.value, 4);
            memcpy(&four[1], high + m * a.kpad + k + 4 * step.value, 4);
            UNROLL
            for (int t = 0; t < T; t++)
              UNROLL
              for (int p = 0; p < kParts; p++) {
                dots[m][t][p] = dot4(dots[m][t][p], codes[t][p], splat(four[0]));
                tops[m][t][p] = dot4(tops[m][t][p], codes[t][p], splat(four[1]));
              }
          }
        });
      }
      UNROLL
      for (int t = 0; t < T; t++)
        UNROLL
        for (int p = 0; p < kParts; p++) {
          const vf scale = (t ? last : first).scale(c, g, p);
          UNROLL
          for (int m = 0; m < M; m++)
            sums[m][t][p] += to_float((tops[m][t][p] << 8) + dots[m][t][p]) *
                             (scale * a.xs[b * a.m + m0 + m]);
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

void plane_pairs(const Coded& c, int64_t t0, int64_t t1) {
  if constexpr (kLanes == 16)  // elsewhere nothing calls it
    unrolled<1, 8>([&](auto bits) {
      if (c.bits == bits.value)
        each_tile<kExactRows>(t0, t1, 0, c.a.m, [&](auto m, auto t, int64_t tile, int64_t row) {
          pairs<bits.value, m.value, t.value>(c, tile, row);
        });
    });
}

}  // namespace CPU_LEVEL
