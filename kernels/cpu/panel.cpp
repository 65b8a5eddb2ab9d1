// y = x W^T for many rows of x, in fp32: the path of float weights without native products, of weight-only
// formats whose activations stay as they are, and of n-bit codes that nothing else multiplies faster.
//
// W is widened to fp32 panels of 32 outputs and kDepth columns, transposed so that one vector
// holds one column of 16 outputs (tiles lie like that already). Panels stay in the L2 cache
// while all rows of x pass, 12 at a time, with the 24 sums in registers.
#include "multiply.h"

namespace CPU_LEVEL {

constexpr int kWidth = kPanelWidth, kDepth = kPanelDepth;
// Columns k0 .. k1 of 16 rows of a row-major weight, transposed; rows past n are zeros.
static void float_panel(const Linear& a, int64_t tile, int64_t k0, int64_t k1, float* out) {
  for (int r0 = 0; r0 < 16; r0 += kLanes) {
    const int64_t first = tile * 16 + r0;
    int64_t k = k0;
    for (; k + kLanes <= min(k1, a.k) && first + kLanes <= a.n; k += kLanes) {
      vf rows[kLanes];
      UNROLL
      for (int i = 0; i < kLanes; i++) rows[i] = load_many(a.w, a.type, (first + i) * a.k + k);
      transpose(rows);
      UNROLL
      for (int i = 0; i < kLanes; i++) store(out + (k - k0 + i) * kWidth + r0, rows[i]);
    }
    for (; k < k1; k++)
      for (int i = 0; i < kLanes; i++)
        out[(k - k0) * kWidth + r0 + i] =
            k < a.k && first + i < a.n ? load_one(a.w, a.type, (first + i) * a.k + k) : 0;
  }
}

void panels(const Coded& c, Format format, int64_t p0, int64_t p1, float* scratch) {
  const Linear& a = c.a;
  float* panel = scratch;
  float* sums = scratch + kDepth * kWidth;
  auto* widen = format == Format::int8 ? int8_panel : format == Format::int4 ? int4_panel : float_panel;
  for (int64_t p = p0; p < p1; p++) {
    memset(sums, 0, a.m * kWidth * sizeof(float));
    for (int64_t k0 = 0; k0 < a.kpad; k0 += kDepth) {
      const int64_t k1 = min(k0 + kDepth, a.kpad);
      for (int t = 0; t < 2; t++)
        if (const int64_t tile = p * 2 + t; tile * 16 >= a.n) {}
        else if (format == Format::coded) coded_widen(c, tile, k0, k1, kWidth, panel + t * 16);
        else widen(a, tile, k0, k1, panel + t * 16);
      multiply_all(a.m, kWidth, a.x + k0, a.kpad, panel, kWidth, k1 - k0, sums, kWidth);
    }
    for (int64_t m = 0; m < a.m; m++)
      for (int64_t t = 0; t < 2; t++)
        if ((p * 2 + t) * 16 < a.n) {
          vf line[kParts];
          UNROLL
          for (int i = 0; i < kParts; i++)
            line[i] = load<vf>(sums + m * kWidth + t * 16 + i * kLanes) * (a.xs ? a.xs[m] : 1.0f);
          finish(a, m, (p * 2 + t) * 16, line);
        }
  }
}

}  // namespace CPU_LEVEL
