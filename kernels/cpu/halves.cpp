// Few rows of bf16 x with small floats by the product of bf16 pairs: lane r of a vector holds two columns
// of the tile's row r, and meets the same two of x.
#include "halves.h"

namespace CPU_LEVEL {

// Rows m0 .. m0 + R of x times tile t.
template <int Bits, int E, int R>
static void rows(const Coded& c, const Halves<Bits, E>& value, int64_t t, int64_t m0) {
  constexpr int kAhead = 4096 / 4;  // words of codes
  const Linear& a = c.a;
  const Tile tile(c, t);
  const int64_t stride = a.kpad / 2;
  const int32_t* x = (const int32_t*)a.x + m0 * stride;  // pairs
  vf even[R] = {}, odd[R] = {};
  for (int64_t k = 0; k < a.kpad; k += kBlock, x += kBlock / 2) {
    const uint32_t* codes = tile.codes + k / kBlock * Bits * 16;
    UNROLL
    for (int line = 0; line < Bits; line++) prefetch(codes + kAhead + line * 16);
    unrolled<0, kBlock / 4>([&](auto step) __attribute__((always_inline)) {
      vu first, second;
      value.widen((__m512i)four_codes<Bits, step.value>(codes, 0), first, second);
      UNROLL
      for (int r = 0; r < R; r++) {
        even[r] = dot2(even[r], first, (vu)splat(x[r * stride + 2 * step.value]));
        odd[r] = dot2(odd[r], second, (vu)splat(x[r * stride + 2 * step.value + 1]));
      }
    });
  }
  const vf scale = tile.scale(c, 0, 0) * Halves<Bits, E>::kFactor;
  for (int r = 0; r < R; r++) {
    const vf line = (even[r] + odd[r]) * (a.xs ? scale * a.xs[m0 + r] : scale);
    finish(a, m0 + r, t * 16, &line);
  }
}

void half_tiles(const Coded& c, int64_t t0, int64_t t1) {
  each_small_float(c, [&](auto bits, auto e) {
    const Halves<bits.value, e.value> value(c);
    for (int64_t t = t0; t < t1; t++)
      each_row<8, 1>(t, 0, c.a.m, [&](auto count, auto, int64_t tile, int64_t m) {
        rows<bits.value, e.value, count.value>(c, value, tile, m);
      });
  });
}

}  // namespace CPU_LEVEL
