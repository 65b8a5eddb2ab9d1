// The kernels of one level, each defined in the file named after its format.
#pragma once
#include "simd.h"

namespace CPU_LEVEL {
void widen_rows(const void*, Type, int64_t m, int64_t k, int64_t kpad, bool paired, float* out);
void quantize_rows(const void* x, const Linear&, const Quantized&, int64_t m0, int64_t m1);
void float_rows(const Linear&, int64_t n0, int64_t n1);
void unsigned_rows(const void* x, const Linear&, const Quantized&, int64_t m0, int64_t m1);
void int8_tiles(const Linear&, int64_t tile0, int64_t tile1);
void int8_exact(const Linear&, int64_t tile0, int64_t tile1);
void int8_pairs(const Linear&, int64_t tile0, int64_t tile1);
// columns k0 .. k1 of a tile as fp32, 16 outputs at out[(k - k0) * kPanelWidth]
void int8_panel(const Linear&, int64_t tile, int64_t k0, int64_t k1, float* out);
void int4_tiles(const Linear&, int64_t tile0, int64_t tile1);
void int4_exact(const Linear&, int64_t tile0, int64_t tile1);
void int4dq_tiles(const Linear&, int64_t tile0, int64_t tile1);
void int4_panel(const Linear&, int64_t tile, int64_t k0, int64_t k1, float* out);
void panels(const Coded&, Format, int64_t panel0, int64_t panel1, float* scratch);
void bf16_panels(const Coded&, Format, int64_t panel0, int64_t panel1);
void round_rows(float* x, int64_t m, int64_t kpad, int mode, float* scales);
void coded_tiles(const Coded&, int64_t tile0, int64_t tile1);
void plane_pairs(const Coded&, int64_t tile0, int64_t tile1);
void sparse_pairs(const Coded&, int64_t tile0, int64_t tile1);
void half_tiles(const Coded&, int64_t tile0, int64_t tile1);
void coded_widen(const Coded&, int64_t tile, int64_t k0, int64_t k1, int64_t stride, float* out);
void attend(const Attention&, int64_t begin, int64_t end);
void merge(const float* parts, int64_t splits, int64_t stride, int64_t rows, int64_t r, int64_t d,
           Type, void* y, int64_t at);
float read_sum(const void*, int64_t bytes);
void rms_norm(const void*, const void* weight, Type, int64_t m, int64_t k, float eps, void*);
void rotate(const void*, Type, const float* cos, const float* sin, int64_t d, void*);
void silu_mul(const void* gate, const void* up, Type, int64_t n, void*);
void add(const void*, const void*, Type, int64_t n, void*);
void multiply_scale(const void*, const void* scale, Type, int64_t n, void*);
float quantize_slot(const void*, Type, int64_t d, Type scale_type, int8_t*);

constexpr int kInt4Params = 64;  // bytes of the scales and zeros of a group
INLINE int64_t int4_tile_bytes(const Linear& a) { return a.kpad * 8 + a.groups * kInt4Params; }

// Bits of the codes whose values a byte permutation looks up.
#if defined(__AVX512VBMI__)
constexpr int kLookupBits = 6;
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int kLookupBits = 4;
#else
constexpr int kLookupBits = 0;
#endif

// How x of 16 bits meets unsigned bytes of w: where products of bytes are one instruction, as the high and
// the low bytes of four columns, else as 16 bits of columns 0 and 2, and of 1 and 3.
constexpr bool kVnni = kLookupBits > 0;

struct Four {
  int32_t first, second;
};

// Columns k .. k + 3 of row m of x in pairs, see quantize_rows.
INLINE Four four_of(const Linear& a, int64_t m, int64_t k) {
  Four x;
  if (kVnni) {
    memcpy(&x.first, a.xq + m * a.kpad + k, 4);
    memcpy(&x.second, a.xq + (a.m + m) * a.kpad + k, 4);
  } else {
    memcpy(&x, a.xq + 2 * (m * a.kpad + k), 8);
  }
  return x;
}

// 256 tops + dots += w . x
INLINE void add_dot(vi& tops, vi& dots, vi w, Four x) {
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512VNNI__)
  const __m256i even = _mm256_and_si256((__m256i)w, _mm256_set1_epi16(255));
  const __m256i odd = _mm256_srli_epi16((__m256i)w, 8);
  dots += (vi)_mm256_madd_epi16(even, (__m256i)splat(x.first));
  dots += (vi)_mm256_madd_epi16(odd, (__m256i)splat(x.second));
#else
  tops = dot4(tops, w, splat(x.first));
  dots = dot4(dots, w, splat(x.second));
#endif
}

constexpr int kTiles = kLanes == 16 ? 2 : 1;  // tiles and rows of x whose sums fit the registers
constexpr int kRows = kLanes == 16 ? 6 : 2;
constexpr int kExactRows = kLanes == 16 ? 4 : 2;

// The integer sums of block b at their start: what the weight's zero code takes from each row of x.
template <int M, int T>
INLINE void start_dots(const Linear& a, int64_t b, int64_t m0, vi (&dots)[M][T][kParts]) {
  UNROLL
  for (int m = 0; m < M; m++)
    UNROLL
    for (int t = 0; t < T; t++)
      UNROLL
      for (int p = 0; p < kParts; p++) dots[m][t][p] = splat(a.offset[b * a.m + m0 + m]);
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// f(Int<rows>, Int<tiles>, tile, row) over tiles [t0, t1) and rows [m0, m1), R rows at most a call.
template <int R, int T, class F>
INLINE void each_row(int64_t tile, int64_t m0, int64_t m1, const F& f) {
  for (; m0 + R <= m1; m0 += R) f(Int<R>{}, Int<T>{}, tile, m0);
  if constexpr (R > 1)
    if (m0 < m1) each_row<R - 1, T>(tile, m0, m1, f);
}

template <int R, class F>
INLINE void each_tile(int64_t t0, int64_t t1, int64_t m0, int64_t m1, const F& f) {
  for (; t0 + kTiles <= t1; t0 += kTiles) each_row<R, kTiles>(t0, m0, m1, f);
  for (; t0 < t1; t0++) each_row<R, 1>(t0, m0, m1, f);
}

}  // namespace CPU_LEVEL
