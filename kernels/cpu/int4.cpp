// y = x W^T with w = (q - 8) s + z: 4-bit codes in tiles, a bf16 scale and zero per row and group.
//
// Tile t holds output rows 16 t .. 16 t + 15, group after group: for each 8 columns 64 bytes (byte
// 4 r + i of row r: column i in the low nibble, column 4 + i in the high one), then each row's scale
// and zero of the group. One stream of memory, and the form that the VNNI product takes.
// With x ~ xs * xq in blocks that divide a group,
//   sum x w = sum over groups of s * (sum over blocks of xs * (xq . q - 8 sum xq)) + z * sum x
#include "level.h"

namespace CPU_LEVEL {

INLINE vi low_nibbles(vi v) { return v & 0x0f0f0f0f; }
INLINE vi high_nibbles(vi v) { return (v >> 4) & 0x0f0f0f0f; }

// The scales and the zeros of part p of a tile's rows.
INLINE vf scales(const uint8_t* params, int p) { return bf16_even(load<vu>(params + p * kLanes * 4)); }
INLINE vf zeros(const uint8_t* params, int p) { return bf16_odd(load<vu>(params + p * kLanes * 4)); }

// M rows of x against T tiles: int8 activations. `bytes`: null, or the tiles' codes unpacked.
template <int M, int T, bool kUnpacked>
static void quantized(const Linear& a, int64_t tile, int64_t m0, const uint8_t* bytes) {
  vf sums[M][T][kParts] = {};
  const uint8_t* w = (const uint8_t*)a.w + tile * int4_tile_bytes(a);
  const int64_t stride = int4_tile_bytes(a), per_group = a.group / a.block;
  const int64_t ahead = M == kRows && m0 ? 0 : T * stride;  // bytes; many rows ask for them once
  const int8_t* xq = a.xq + m0 * a.kpad;
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t begin = g * a.group, end = min(begin + a.group, a.kpad);
    const uint8_t* codes = w + begin * 8 + g * kInt4Params;
    const uint8_t* params = codes + (end - begin) * 8;
    int64_t b = g * per_group;
    for (int64_t k0 = begin; k0 < end; k0 += a.block, b++) {
      vi dots[M][T][kParts];
      start_dots(a, b, m0, dots);
      const int64_t k1 = min(k0 + a.block, end);
      auto step = [&](int64_t k, const vi (&q)[T][kParts]) __attribute__((always_inline)) {
        UNROLL
        for (int m = 0; m < M; m++) {
          int32_t four;
          memcpy(&four, xq + m * a.kpad + k, 4);
          UNROLL
          for (int t = 0; t < T; t++)
            UNROLL
            for (int p = 0; p < kParts; p++)
              dots[m][t][p] = dot4_small(dots[m][t][p], q[t][p], splat(four));
        }
      };
      if constexpr (kUnpacked) {
        _Pragma("GCC unroll 4")
        for (int64_t k = k0; k < k1; k += 4) {
          vi q[T][kParts];
          UNROLL
          for (int t = 0; t < T; t++)
            UNROLL
            for (int p = 0; p < kParts; p++)
              q[t][p] = load<vi>(bytes + (t * a.kpad + k) * 16 + p * kLanes * 4);
          step(k, q);
        }
      } else {
        for (int64_t k = k0; k < k1; k += 8) {
          vi low[T][kParts], high[T][kParts];
          UNROLL
          for (int t = 0; t < T; t++)
            UNROLL
            for (int p = 0; p < kParts; p++) {
              const uint8_t* line = codes + t * stride + (k - begin) * 8;
              vi v = load<vi>(line + p * kLanes * 4);
              if (p == 0) prefetch(line + ahead);
              low[t][p] = low_nibbles(v);
              high[t][p] = high_nibbles(v);
            }
          step(k, low);
          step(k + 4, high);
        }
      }
      const uint8_t* late = params;
      asm("" : "+r"(late));  // keep the scales out of the registers until the dots are done
      UNROLL
      for (int t = 0; t < T; t++)
        UNROLL
        for (int p = 0; p < kParts; p++) {
          if (p == 0) prefetch(late + t * stride + ahead);
          vf scale = scales(late + t * stride, p);
          UNROLL
          for (int m = 0; m < M; m++)
            sums[m][t][p] += to_float(dots[m][t][p]) * (scale * a.xs[b * a.m + m0 + m]);
        }
    }
    UNROLL
    for (int t = 0; t < T; t++)
      UNROLL
      for (int p = 0; p < kParts; p++) {
        vf zero = zeros(params + t * stride, p);
        UNROLL
        for (int m = 0; m < M; m++) sums[m][t][p] += zero * a.group_sum[g * a.m + m0 + m];
      }
  }
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) finish(a, m0 + m, (tile + t) * 16, sums[m][t]);
}

// The code of nibble i of each 32-bit lane, as fp32.
INLINE vf nibble(vi v, int i) {
#if defined(__AVX512F__)  // a table of 16 floats; the upper bits of the index are ignored
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)v, 4 * i), table);
#else
  return to_float((v >> (4 * i)) & 15);
#endif
}

// M rows of x against T tiles: fp32 activations, weights widened in registers.
template <int M, int T>
static void exact(const Linear& a, int64_t tile, int64_t m0) {
  vf sums[M][T][kParts] = {};
  const uint8_t* w = (const uint8_t*)a.w + tile * int4_tile_bytes(a);
  const int64_t stride = int4_tile_bytes(a);
  const float* x = a.x + m0 * a.kpad;
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t begin = g * a.group, end = min(begin + a.group, a.kpad);
    const uint8_t* codes = w + begin * 8 + g * kInt4Params;
    const uint8_t* params = codes + (end - begin) * 8;
    vf dots[M][T][kParts] = {}, more[M][T][kParts] = {};
    for (int64_t k = begin; k < end; k += 8)
      UNROLL
      for (int t = 0; t < T; t++)
        UNROLL
        for (int p = 0; p < kParts; p++) {
          const uint8_t* line = codes + t * stride + (k - begin) * 8;
          vi v = load<vi>(line + p * kLanes * 4);
          if (p == 0) prefetch(line + T * stride);
          UNROLL
          for (int i = 0; i < 8; i++) {
            vf q = nibble(v, i);
            UNROLL
            for (int m = 0; m < M; m++) {
              vf& into = M == 1 && i % 2 ? more[m][t][p] : dots[m][t][p];
              into += q * x[m * a.kpad + k + i / 2 + i % 2 * 4];
            }
          }
        }
    UNROLL
    for (int t = 0; t < T; t++)
      UNROLL
      for (int p = 0; p < kParts; p++) {
        vf scale = scales(params + t * stride, p), zero = zeros(params + t * stride, p);
        if (p == 0) prefetch(params + (t + T) * stride);
        UNROLL
        for (int m = 0; m < M; m++)
          sums[m][t][p] += scale * (dots[m][t][p] + more[m][t][p]) +
                           (zero - 8 * scale) * a.group_sum[g * a.m + m0 + m];
      }
  }
  for (int t = 0; t < T; t++)
    for (int m = 0; m < M; m++) finish(a, m0 + m, (tile + t) * 16, sums[m][t]);
}

// The codes of a tile as bytes, four columns of 16 rows in 64 of them: the form of int8 tiles.
static void unpack(const Linear& a, int64_t tile, uint8_t* out) {
  const uint8_t* w = (const uint8_t*)a.w + tile * int4_tile_bytes(a);
  for (int64_t k = 0; k < a.kpad; k += 8)
    for (int p = 0; p < kParts; p++) {
      vi v = load<vi>(w + k * 8 + k / a.group * kInt4Params + p * kLanes * 4);
      store(out + k * 16 + p * kLanes * 4, low_nibbles(v));
      store(out + k * 16 + 64 + p * kLanes * 4, high_nibbles(v));
    }
}

void int4_tiles(const Linear& a, int64_t t0, int64_t t1) {
  constexpr int64_t kMost = 16384;  // columns whose bytes, 512 KiB for two tiles, fit any stack
  if (a.m < 4 * kRows || a.kpad > kMost) {
    each_tile<kRows>(t0, t1, 0, a.m, [&](auto m, auto t, int64_t tile, int64_t row) {
      quantized<m.value, t.value, false>(a, tile, row, nullptr);
    });
    return;
  }
  uint8_t* bytes = (uint8_t*)__builtin_alloca_with_align(kTiles * a.kpad * 16, 512);
  for (; t0 < t1; t0 += kTiles) {
    const int64_t end = min(t0 + kTiles, t1);
    for (int64_t t = t0; t < end; t++) unpack(a, t, bytes + (t - t0) * a.kpad * 16);
    each_tile<kRows>(t0, end, 0, a.m, [&](auto m, auto t, int64_t tile, int64_t row) {
      quantized<m.value, t.value, true>(a, tile, row, bytes + (tile - t0) * a.kpad * 16);
    });
  }
}

void int4_exact(const Linear& a, int64_t t0, int64_t t1) {
  each_tile<kExactRows>(t0, t1, 0, a.m, [&](auto m, auto t, int64_t tile, int64_t row) {
    exact<m.value, t.value>(a, tile, row);
  });
}

// The weights w as fp32.
void int4_panel(const Linear& a, int64_t tile, int64_t k0, int64_t k1, float* out) {
  for (int64_t k = k0; k < k1; k += 8) {
    const int64_t g = k / a.group, begin = g * a.group, end = min(begin + a.group, a.kpad);
    const uint8_t* codes = (const uint8_t*)a.w + tile * int4_tile_bytes(a) + begin * 8 + g * kInt4Params;
    const uint8_t* params = codes + (end - begin) * 8;
    for (int p = 0; p < kParts; p++) {
      vf scale = scales(params, p), zero = zeros(params, p);
      vi v = load<vi>(codes + (k - begin) * 8 + p * kLanes * 4);
      UNROLL
      for (int i = 0; i < 8; i++)
        store(out + (k - k0 + i / 2 + i % 2 * 4) * kPanelWidth + p * kLanes,
              (nibble(v, i) - 8.0f) * scale + zero);
    }
  }
}

}  // namespace CPU_LEVEL
