// Rows of bf16 x with small floats by the product of bf16 pairs: lane r of a vector holds two columns
// of the tile's row r, and meets the same two of x. From kManyRows rows on panels of two tiles are widened
// once, for all of them.
#include "halves.h"
#include "multiply.h"

namespace CPU_LEVEL {

constexpr int64_t kManyRows = 9, kRowsAtOnce = 256;  // of x
constexpr int64_t kDepth = 512, kWidth = 32;         // columns of a panel; its outputs

// Columns k0 .. k1 of tile t: of each two columns 16 outputs, kWidth apart.
template <int Bits, int E>
static void widen_panel(const Coded& c, const Halves<Bits, E>& value, int64_t t, int64_t k0,
                        int64_t k1, uint32_t* out) {
  const Tile tile(c, t);
  for (int64_t k = k0; k < k1; k += kBlock) {
    const uint32_t* codes = tile.codes + k / kBlock * Bits * 16;
    unrolled<0, kBlock / 4>([&](auto step) __attribute__((always_inline)) {
      vu even, odd;
      value.widen((__m512i)four_codes<Bits, step.value>(codes, 0), even, odd);
      store(out, even);
      store(out + kWidth, odd);
      out += 2 * kWidth;
    });
  }
}

// sums [rows, kWidth] += so many pairs of columns of x times a panel. Its caller is compiled once a format.
static __attribute__((noinline)) void multiply_panel(int64_t rows, const float* x, int64_t x_stride,
                                                     const uint32_t* panel, int64_t pairs, float* sums) {
  multiply_all<true>(rows, kWidth, x, x_stride, (const float*)panel, kWidth, pairs, sums, kWidth);
}

// All rows of x times tiles t and, of two, t + 1.
template <int Bits, int E>
static void panel(const Coded& c, const Halves<Bits, E>& value, int64_t t, int64_t count) {
  alignas(64) static thread_local uint32_t weight[kDepth / 2 * kWidth];
  alignas(64) static thread_local float sums[kRowsAtOnce * kWidth];
  const Linear& a = c.a;
  for (int64_t m0 = 0; m0 < a.m; m0 += kRowsAtOnce) {
    const int64_t rows = min(kRowsAtOnce, a.m - m0);
    memset(sums, 0, rows * kWidth * 4);
    for (int64_t k = 0; k < a.kpad; k += kDepth) {
      const int64_t end = min(k + kDepth, a.kpad);
      for (int64_t i = 0; i < count; i++) widen_panel(c, value, t + i, k, end, weight + i * 16);
      multiply_panel(rows, a.x + (m0 * a.kpad + k) / 2, a.kpad / 2, weight, (end - k) / 2, sums);
    }
    for (int64_t i = 0; i < count; i++) {
      const vf scale = Tile(c, t + i).scale(c, 0, 0) * Halves<Bits, E>::kFactor;
      for (int64_t m = 0; m < rows; m++) {
        const vf line = load<vf>(sums + m * kWidth + i * 16) * (a.xs ? scale * a.xs[m0 + m] : scale);
        finish(a, m0 + m, (t + i) * 16, &line);
      }
    }
  }
}

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
    for (int64_t t = t0; c.a.m >= kManyRows && t < t1; t += 2) panel(c, value, t, min(2, t1 - t));
    for (int64_t t = t0; c.a.m < kManyRows && t < t1; t++)
      each_row<8, 1>(t, 0, c.a.m, [&](auto count, auto, int64_t tile, int64_t m) {
        rows<bits.value, e.value, count.value>(c, value, tile, m);
      });
  });
}

}  // namespace CPU_LEVEL
