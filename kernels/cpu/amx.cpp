// Many rows of x against quantized weights on AMX tiles: matrices of up to 16 rows of 64 bytes.
//
//   int8dq        x int8, 5 rows and more; codes as they lie: four columns of 16 rows are a row of AMX's B
//   the rest      x bf16, weights widened to bf16 or, where its 8 bits do not hold them, to the sum
//                 of two bf16 numbers, whose 16 bits are more than the result's rounding shows
//
// 32 rows of x meet 32 outputs: two tiles of x, two of the weight, four of sums.
#include "amx.h"

namespace avx512 {
extern const Kernels kernels;
decltype(CPU_LEVEL::int8_panel) int8_panel;
decltype(CPU_LEVEL::int4_panel) int4_panel;
decltype(CPU_LEVEL::coded_widen) coded_widen;
}  // namespace avx512

namespace CPU_LEVEL {

// Columns k0 .. k0 + depth of two tiles as bf16: of each tile two neighbouring columns of 16 outputs
// in 64 bytes. Of two_bf16 then what the first numbers lack.
template <Weight kind>
static void widen_panel(const Coded& c, Format format, int64_t tile, int64_t k0, int64_t depth,
                        uint32_t* out) {
  constexpr int64_t kChunk = 32;
  alignas(64) float columns[kChunk * kPanelWidth];
  const Linear& a = c.a;
  auto* widen = format == Format::int8 ? avx512::int8_panel : avx512::int4_panel;
  for (int64_t t = 0; t < 2; t++)
    for (int64_t k = 0; k < depth; k += kChunk) {
      const int64_t end = min(k0 + k + kChunk, a.kpad);
      memset(columns, 0, sizeof columns);
      if ((tile + t) * 16 >= a.n || k0 + k >= end) {}
      else if (format != Format::coded) widen(a, tile + t, k0 + k, end, columns);
      else avx512::coded_widen(c, tile + t, k0 + k, end, kPanelWidth, columns);
      for (int64_t i = 0; i < kChunk; i += 2) {
        const vf even = load<vf>(columns + i * kPanelWidth);
        const vf odd = load<vf>(columns + (i + 1) * kPanelWidth);
        const vf even_top = (vf)((vu)even & 0xffff0000), odd_top = (vf)((vu)odd & 0xffff0000);
        uint32_t* to = out + (t * depth + k + i) * 8;
        store(to, (vu)even_top >> 16 | (vu)odd_top);
        if (kind == Weight::two_bf16)
          store(to + 2 * depth * 8,
                ((vu)(even - even_top) + 0x8000) >> 16 | (((vu)(odd - odd_top) + 0x8000) & 0xffff0000));
      }
    }
}

template <Weight kind>
static void panels_as(const Coded& c, Format format, int64_t p0, int64_t p1) {
  const Linear& a = c.a;
  constexpr int64_t kDepth = 1024, kRowsAtOnce = 512;  // of x: 1 MB, in the L2 cache
  alignas(64) static thread_local uint32_t panel[2 * kDepth * kSide];
  alignas(64) static thread_local float sums[kRowsAtOnce * kWidth];
  const int64_t columns = (a.k + 31) / 32 * 32;
  const Tiles tiles;
  for (int64_t m0 = 0; m0 < a.m; m0 += kRowsAtOnce) {
    const int64_t rows = min(kRowsAtOnce, a.m - m0);
    for (int64_t p = p0; p < p1; p++) {
      for (int64_t k0 = 0; k0 < columns; k0 += kDepth) {
        const int64_t depth = min(kDepth, columns - k0);
        widen_panel<kind>(c, format, p * 2, k0, depth, panel);
        const char* x = (const char*)a.x + (m0 * columns + k0) * 2;
        groups_of_rows(rows, [&](auto count, int64_t r) {
          multiply_tiles<count.value, kind>(x + r * columns * 2, columns * 2, (const char*)panel,
                                            depth * 32, depth / 32, k0 == 0, sums + r * kWidth);
        });
      }
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < 2 && (p * 2 + i) * 16 < a.n; i++) {
          const vf line = load<vf>(sums + r * kWidth + i * 16) * (a.xs ? a.xs[m0 + r] : 1.0f);
          finish(a, m0 + r, (p * 2 + i) * 16, &line);
        }
    }
  }
}

void bf16_panels(const Coded& c, Format format, int64_t p0, int64_t p1) {
  if (format == Format::int8) panels_as<Weight::bf16>(c, format, p0, p1);
  else panels_as<Weight::two_bf16>(c, format, p0, p1);
}

void int8_tiles(const Linear& a, int64_t t0, int64_t t1) {
  constexpr int64_t kStep = 64;
  if (a.m < kFewest || a.kpad % kStep) return avx512::kernels.int8_tiles(a, t0, t1);
  const int64_t stride = a.kpad * 16;  // bytes of a tile
  alignas(64) int32_t sums[kWidth * kWidth];
  const Tiles tiles(min(a.m, kSide));
  for (int64_t t = t0; t < t1; t += 2) {
    const int64_t count = min(2, t1 - t);
    groups_of_rows(a.m, [&](auto rows, int64_t r) {
      multiply_tiles<rows.value, Weight::unsigned_for_signed>(
          (const char*)a.xq + r * a.kpad, a.kpad, (const char*)a.w + t * stride,
          (count - 1) * stride, a.kpad / kStep, true, sums);
      for (int64_t i = 0; i < min(rows.value * kSide, a.m - r); i++)
        for (int64_t j = 0; j < count; j++) {
          const vi dots = load<vi>(sums + i * kWidth + j * 16) + a.offset[r + i];
          const vf line = to_float(dots) * a.xs[r + i];
          finish(a, r + i, (t + j) * 16, &line);
        }
    });
  }
}

}  // namespace CPU_LEVEL
