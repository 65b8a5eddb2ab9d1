// y = x W^T in integers: 4-bit codes, x rounded to bytes; see int4dq.h.
#include "int4dq.h"

namespace CPU_LEVEL {

constexpr int kLineRows = kLanes / 4;  // rows of the weight in one vector
constexpr int kFew = kLanes == 16 ? 4 : 2, kMany = kLanes == 16 ? 6 : 2;  // rows of x at a time

// 16 bytes, in every 128 bits.
INLINE vi repeat(const void* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (vi)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
#else
  return load<vi>((const char*)p);
#endif
}

// acc += products of bytes of x with integers, of 4 bits but where they are nested.
template <bool nested>
INLINE vi dot(vi acc, vi u, vi q) {
  return nested ? dot4(acc, u, q) : dot4_small(acc, u, q);
}

// Numbers 0 .. kLineRows - 1 at p, four times each.
INLINE vf four_times(const float* p) {
  vf out;
#if defined(__AVX512F__)
  const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  out = (vf)_mm512_permutexvar_ps(each, _mm512_castps128_ps512(_mm_loadu_ps(p)));
#else
  for (int i = 0; i < kLanes; i++) out[i] = p[i / 4];
#endif
  return out;
}

// The four parts of each row's sum, added.
template <class T, class V>
INLINE void add_parts(const V (&parts)[4][kParts], T* rows) {
  T all[64];
  memcpy(all, parts, sizeof all);
  for (int r = 0; r < 16; r++)
    rows[r] = (all[4 * r] + all[4 * r + 1]) + (all[4 * r + 2] + all[4 * r + 3]);
}

// The integers of a tile as bytes: of each 32 columns the first 16, then the others, row by row.
template <bool nested>
static void unpack(const Linear& a, int64_t tile, uint8_t* out) {
  const uint8_t* w = (const uint8_t*)a.w + tile * tile_bytes(a);
  for (int64_t g = 0; g < a.groups; g++) {
    vi tables[4][kParts];
    load_tables<nested>(w, tables);
    w += kParams;
    for (int64_t k = g * a.group; k < min((g + 1) * a.group, a.kpad); k += kColumns, out += 512)
      for (int j = 0; j < 4; j++)
        for (int p = 0; p < kParts; p++, w += 4 * kLanes) {
          const vi v = load<vi>(w);
          uint8_t* to = out + j * 64 + p * 4 * kLanes;
          store(to, lookup(tables[j][p], v & 0x0f0f0f0f));
          store(to + 256, lookup(tables[j][p], (v >> 4) & 0x0f0f0f0f));
        }
  }
}

// M rows of x against a tile. `bytes`: null, or the tile's integers unpacked.
template <int M, bool nested, bool kUnpacked>
static void multiply(const Linear& a, int64_t tile, int64_t m0, const uint8_t* bytes) {
  const int64_t stride = tile_bytes(a);
  const uint8_t* w = (const uint8_t*)a.w + tile * stride;
  const uint8_t* x = (const uint8_t*)a.xq + m0 * a.kpad;
  vi dots[M][4][kParts] = {}, tables[4][kParts];
  vf sums[M][4][kParts] = {};
  alignas(64) int8_t entries[2][256];  // tables of this group and, made in good time, of the next one
  if (nested && !kUnpacked) make_tables((const uint16_t*)w, entries[0]);
  alignas(64) int32_t whole[16] = {};  // sums of the weight's rows; scaled: times the scales
  alignas(64) float scaled[16] = {}, scales[16];
  for (int64_t g = 0; g < a.groups; g++) {
    const uint16_t* params = (const uint16_t*)w;
    const int16_t* group_sums = (const int16_t*)(w + 32);
    const int64_t end = min((g + 1) * a.group, a.kpad);
    if (!kUnpacked && nested) {
      const uint8_t* next = w + kParams + (end - g * a.group) / kColumns * kChunkBytes;
      memcpy(tables, entries[g % 2], sizeof tables);
      if (g + 1 < a.groups) make_tables((const uint16_t*)next, entries[(g + 1) % 2]);
    } else if (!kUnpacked && g == 0) {
      load_tables<false>(w, tables);
    }
    w += kParams;
    for (int64_t k = g * a.group; k < end; k += kColumns, w += kChunkBytes) {
      if constexpr (kUnpacked) {
        for (int half = 0; half < 2; half++, bytes += 256) {
          vi u[M];
          UNROLL
          for (int m = 0; m < M; m++) u[m] = repeat(x + m * a.kpad + k + 16 * half);
          UNROLL
          for (int j = 0; j < 4; j++)
            UNROLL
            for (int p = 0; p < kParts; p++) {
              const vi q = load<vi>(bytes + j * 64 + p * 4 * kLanes);
              UNROLL
              for (int m = 0; m < M; m++) dots[m][j][p] = dot<nested>(dots[m][j][p], u[m], q);
            }
        }
        continue;
      }
      vi first[M], second[M];
      UNROLL
      for (int m = 0; m < M; m++) {
        first[m] = repeat(x + m * a.kpad + k);
        second[m] = repeat(x + m * a.kpad + k + 16);
      }
      UNROLL
      for (int j = 0; j < 4; j++)
        UNROLL
        for (int p = 0; p < kParts; p++) {
          const uint8_t* line = w + j * 64 + p * 4 * kLanes;
          const vi v = load<vi>(line);
          if (p == 0) prefetch(line + stride);
          const vi low = lookup(tables[j][p], v & 0x0f0f0f0f);
          const vi high = lookup(tables[j][p], (v >> 4) & 0x0f0f0f0f);
          UNROLL
          for (int m = 0; m < M; m++) {
            dots[m][j][p] = dot<nested>(dots[m][j][p], first[m], low);
            dots[m][j][p] = dot<nested>(dots[m][j][p], second[m], high);
          }
        }
    }
    if (nested) {
      for (int r = 0; r < 16; r++) whole[r] += group_sums[r];
      continue;
    }
    for (int p = 0; p < kParts; p++) store(scales + p * kLanes, bf16_load(params + p * kLanes));
    for (int r = 0; r < 16; r++) scaled[r] += scales[r] * float(group_sums[r]);
    UNROLL
    for (int j = 0; j < 4; j++)
      UNROLL
      for (int p = 0; p < kParts; p++) {
        const vf scale = four_times(scales + j * 4 + p * kLineRows);
        UNROLL
        for (int m = 0; m < M; m++) {
          sums[m][j][p] += to_float(dots[m][j][p]) * scale;
          dots[m][j][p] = vi{};
        }
      }
  }
  for (int m = 0; m < M; m++) {
    const int32_t bottom = a.offset[m0 + m];
    float out[16];
    if (nested) {
      int32_t rows[16];
      add_parts(dots[m], rows);
      for (int r = 0; r < 16; r++) out[r] = float(rows[r] + bottom * whole[r]) * a.xs[m0 + m];
    } else {
      float rows[16];
      add_parts(sums[m], rows);
      for (int r = 0; r < 16; r++) out[r] = (rows[r] + float(bottom) * scaled[r]) * a.xs[m0 + m];
    }
    vf line[kParts];
    memcpy(line, out, sizeof line);
    finish(a, m0 + m, tile * 16, line);
  }
}

template <bool nested>
static void tiles(const Linear& a, int64_t t0, int64_t t1) {
  constexpr int64_t kMost = 16384;  // columns whose bytes, 256 KiB, fit any stack
  const bool many = a.m >= 4 * kMany && a.kpad <= kMost;
  uint8_t* bytes = many ? (uint8_t*)__builtin_alloca_with_align(a.kpad * 16, 512) : nullptr;
  for (int64_t t = t0; t < t1; t++) {
    if (many) {
      unpack<nested>(a, t, bytes);
      each_row<kMany, 1>(t, 0, a.m, [&](auto m, auto, int64_t tile, int64_t row) {
        multiply<m.value, nested, true>(a, tile, row, bytes);
      });
    } else {
      each_row<kFew, 1>(t, 0, a.m, [&](auto m, auto, int64_t tile, int64_t row) {
        multiply<m.value, nested, false>(a, tile, row, nullptr);
      });
    }
  }
}

void int4dq_tiles(const Linear& a, int64_t t0, int64_t t1) {
  if (a.scales) tiles<true>(a, t0, t1);
  else tiles<false>(a, t0, t1);
}

// Rows m0 .. m1 of x as bytes u, x ~ s (u + bottom). Symmetric: s = max(amax / 127, 1e-5), bottom
// -128. Else s = (high - low) / 255 with low <= 0 <= high, and bottom = round(low / s).
void unsigned_rows(const void* x, const Linear& a, const Quantized& out, int64_t m0, int64_t m1) {
  constexpr int64_t kChunk = 2048;
  alignas(64) float values[kChunk + 64];
  alignas(64) int8_t codes[kChunk + 64];
  const int64_t size = a.type == Type::fp32 ? 4 : 2;
  for (int64_t m = m0; m < m1; m++) {
    auto each_chunk = [&](auto f) __attribute__((always_inline)) {
      for (int64_t k = 0; k < a.kpad; k += kChunk) {
        const int64_t real = k < a.k ? min(kChunk, a.k - k) : 0;
        widen_rows((const char*)x + (m * a.k + k) * size, a.type, 1, real, kChunk + 64, false,
                   values);
        f(k, min(kChunk, a.kpad - k));
      }
    };
    Range range;
    each_chunk([&](int64_t, int64_t len) {
      for (int64_t i = 0; i < len; i += kLanes) range.add(load<vf>(values + i));
    });
    // a NaN makes all of the row's results NaN
    const bool span = out.rounding == Rounding::span;
    const float scale = span ? range.scale() : at_least(range.magnitude() / 127, 1e-5f);
    const int32_t bottom = span ? range.bottom(scale) : -128;
    each_chunk([&](int64_t k, int64_t len) {
      for (int64_t i = 0; i < len; i += kLanes) {
        vi u = round_to_int(load<vf>(values + i) / splat(scale)) - bottom;
        u = u < 0 ? vi{} : u > 255 ? splat(255) : u;
        store8(codes + i, u);
      }
      memcpy(out.xq + m * a.kpad + k, codes, len);
    });
    out.xs[m] = scale;
    out.offset[m] = bottom;
  }
}

}  // namespace CPU_LEVEL
