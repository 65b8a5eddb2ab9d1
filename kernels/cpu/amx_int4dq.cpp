// 4-bit codes that multiply bytes (int4dq.h) on AMX tiles, for 5 and more rows of x.
//
// The integers of two tiles, as many groups as 1024 columns hold, are unpacked to bytes as AMX's B:
// four columns of 16 outputs in 64 bytes. All rows of x, unsigned bytes, pass them, 32 at a time.
#include "amx.h"
#include "int4dq.h"

namespace avx512 {
extern const Kernels kernels;
}

namespace CPU_LEVEL {

constexpr int64_t kDepth = 1024, kRowsAtOnce = 512;
constexpr int64_t kTileBytes = kDepth * kSide;  // of one tile's integers

// Numbers r * 4 + c of 16 rows of four, a vector of four rows each, to number c * 16 + r.
INLINE void transpose_fours(vf (&v)[4]) {
  const vi even{0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29}, odd = even + 2;
  const vi low{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high = low + 8;
  const vf a = pick(v[0], v[1], even), b = pick(v[0], v[1], odd);
  const vf c = pick(v[2], v[3], even), d = pick(v[2], v[3], odd);
  v[0] = pick(a, c, low);
  v[1] = pick(a, c, high);
  v[2] = pick(b, d, low);
  v[3] = pick(b, d, high);
}

// One tile's part of a chunk: its groups' scales, and the sums of its rows so far, which x's bottom
// multiplies: of integers, or grouped of the weight.
struct Part {
  vf scales[kDepth / kColumns], weight{};
  vi integers{};
};

// Columns k0 .. k1, whole groups, of the tile at w, which moves past them.
template <bool nested>
static void unpack(const Linear& a, const uint8_t*& w, int64_t k0, int64_t k1, char* out, Part& part) {
  for (int64_t k = k0, g = 0; k < k1; g++) {
    vi tables[4][1];
    load_tables<nested>(w, tables);
    const vi sums = __builtin_convertvector(load<vh>(w + 32), vi) << 16 >> 16;
    part.integers += sums;
    if (!nested) part.weight += to_float(sums) * (part.scales[g] = bf16_load(w));
    w += kParams;
    for (const int64_t end = min(k + a.group, k1); k < end; k += kColumns, w += kChunkBytes)
      for (int shift = 0; shift < 8; shift += 4) {
        vf integers[4];
        for (int j = 0; j < 4; j++)
          integers[j] = (vf)lookup(tables[j][0], load<vi>(w + j * 64) >> shift & 0x0f0f0f0f);
        transpose_fours(integers);
        for (int j = 0; j < 4; j++, out += 64) store(out, integers[j]);
      }
  }
}

template <bool nested, int kStep>
static void product(const Linear& a, int64_t t0, int64_t t1) {
  alignas(64) static thread_local char integers[2][kTileBytes];
  alignas(64) static thread_local float sums[kRowsAtOnce * kWidth];  // nested: of int32
  alignas(64) int32_t dots[kWidth * kWidth];
  const int64_t stride = tile_bytes(a), depth = kDepth / a.group * a.group;
  const Tiles tiles(min(a.m, kSide), kStep);
  for (int64_t m0 = 0; m0 < a.m; m0 += kRowsAtOnce) {
    const int64_t rows = min(kRowsAtOnce, a.m - m0);
    for (int64_t t = t0; t < t1; t += 2) {
      const int64_t count = min(2, t1 - t), apart = (count - 1) * kTileBytes;
      const uint8_t* w[2];
      Part parts[2];
      for (int64_t i = 0; i < count; i++) w[i] = (const uint8_t*)a.w + (t + i) * stride;
      for (int64_t k0 = 0; k0 < a.kpad; k0 += depth) {
        const int64_t k1 = min(k0 + depth, a.kpad);
        for (int64_t i = 0; i < count; i++) unpack<nested>(a, w[i], k0, k1, integers[i], parts[i]);
        groups_of_rows(rows, [&](auto some, int64_t r) {
          constexpr int R = some.value;
          const char* x = (const char*)a.xq + (m0 + r) * a.kpad;
          auto multiply = [&](int64_t from, int64_t to, bool fresh, void* into)
                              __attribute__((always_inline)) {
            multiply_tiles<R, Weight::signed_bytes, kStep>(
                x + from, a.kpad, integers[0] + (from - k0) * kSide, apart, (to - from) / kStep, fresh,
                into);
          };
          float* own = sums + r * kWidth;
          if (nested) return multiply(k0, k1, k0 == 0, own);
          if (k0 == 0) memset(own, 0, R * kSide * kWidth * sizeof(float));
          for (int64_t k = k0, g = 0; k < k1; k += a.group, g++) {
            multiply(k, min(k + a.group, k1), true, dots);
            for (int64_t i = 0; i < R * kSide * kWidth; i += kWidth)
              for (int64_t j = 0; j < count; j++) {
                const vf line = to_float(load<vi>(dots + i + j * 16)) * parts[j].scales[g];
                store(own + i + j * 16, load<vf>(own + i + j * 16) + line);
              }
          }
        });
      }
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i++) {
          const float* own = sums + r * kWidth + i * 16;
          const int32_t bottom = a.offset[m0 + r];
          const vf sum = nested ? to_float(load<vi>(own) + parts[i].integers * bottom)
                                : load<vf>(own) + parts[i].weight * float(bottom);
          const vf line = sum * a.xs[m0 + r];
          finish(a, m0 + r, (t + i) * 16, &line);
        }
    }
  }
}

void int4dq_tiles(const Linear& a, int64_t t0, int64_t t1) {
  if (a.m < kFewest || !a.kpad || a.group > kDepth) return avx512::kernels.int4dq_tiles(a, t0, t1);
  const bool nested = a.scales, wide = a.kpad % 64 == 0 && a.group % 64 == 0;
  if (nested && wide) product<true, 64>(a, t0, t1);
  else if (nested) product<true, 32>(a, t0, t1);
  else if (wide) product<false, 64>(a, t0, t1);
  else product<false, 32>(a, t0, t1);
}

}  // namespace CPU_LEVEL
