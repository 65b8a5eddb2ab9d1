// 4-bit codes in tiles on AMX, for 5 and more rows of x in bytes; see int4.cpp and int4dq.h.
//
// The codes of two tiles, as many groups as 256 columns hold, are unpacked to bytes as AMX's B: four
// columns of 16 outputs in 64 bytes. They stay in the L1 cache while all rows of x pass, 32 at a time.
#include "amx.h"
#include "int4dq.h"

namespace avx512 {
extern const Kernels kernels;
}

namespace CPU_LEVEL {

enum class Form { blocks, grouped, nested };  // of int4.cpp; of int4dq.h

constexpr int64_t kDepth = 256, kRowsAtOnce = 512, kSmallestGroup = 32;
constexpr int64_t kTileBytes = kDepth * kSide;  // of one tile's codes

// One tile's part of a chunk: its groups' scales and, of blocks, zeros; of the others the sums of its
// rows so far, which x's bottom multiplies: of the integers or, grouped, of the weight.
struct Part {
  vf scales[kDepth / kSmallestGroup], zeros[kDepth / kSmallestGroup], weight{};
  vi integers{};
};

// The low nibbles of all bytes, less 8.
INLINE __m512i less_8(vi v) {
  return _mm512_sub_epi8((__m512i)(v & 0x0f0f0f0f), _mm512_set1_epi8(8));
}

// Columns k0 .. k1, whole groups, of the tile at w, which moves past them.
static void unpack_blocks(const Linear& a, const uint8_t*& w, int64_t k0, int64_t k1, char* out,
                          Part& part) {
  const int64_t ahead = 2 * int4_tile_bytes(a);
  for (int64_t k = k0, g = 0; k < k1; g++) {
    for (const int64_t end = min(k + a.group, k1); k < end; k += 8, w += 64, out += 128) {
      const vi v = load<vi>(w);
      prefetch(w + ahead);
      store(out, less_8(v));
      store(out + 64, less_8(v >> 4));
    }
    part.scales[g] = bf16_even(load<vu>(w));
    part.zeros[g] = bf16_odd(load<vu>(w));
    prefetch(w + ahead);
    w += kInt4Params;
  }
}

// Numbers 4 r + c of 16 rows of four, a vector of four rows each, to number 16 c + r.
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

template <bool nested>
static void unpack_integers(const Linear& a, const uint8_t*& w, int64_t k0, int64_t k1, char* out,
                            Part& part) {
  const int64_t ahead = 2 * tile_bytes(a);
  for (int64_t k = k0, g = 0; k < k1; g++) {
    vi tables[4][1];
    load_tables<nested>(w, tables);
    prefetch(w + ahead);
    const vi sums = __builtin_convertvector(load<vh>(w + 32), vi) << 16 >> 16;
    part.integers += sums;
    if (!nested) part.weight += to_float(sums) * (part.scales[g] = bf16_load(w));
    w += kParams;
    for (const int64_t end = min(k + a.group, k1); k < end; k += kColumns, w += kChunkBytes)
      for (int shift = 0; shift < 8; shift += 4) {
        vf integers[4];
        for (int j = 0; j < 4; j++) {
          integers[j] = (vf)lookup(tables[j][0], load<vi>(w + j * 64) >> shift & 0x0f0f0f0f);
          if (shift) prefetch(w + ahead + j * 64);
        }
        transpose_fours(integers);
        for (int j = 0; j < 4; j++, out += 64) store(out, integers[j]);
      }
  }
}

// Tiles take `step` columns at a time: of blocks one block, else what divides kpad and the groups.
template <Form form>
static void product(const Linear& a, int64_t t0, int64_t t1, int64_t step) {
  constexpr bool nested = form == Form::nested, blocks = form == Form::blocks;
  constexpr Weight kind = blocks ? Weight::signed_for_signed : Weight::signed_for_unsigned;
  alignas(64) static thread_local char codes[2][kTileBytes];
  alignas(64) static thread_local float sums[kRowsAtOnce * kWidth];  // nested: of int32
  alignas(64) int32_t dots[kWidth * kWidth];
  const int64_t stride = blocks ? int4_tile_bytes(a) : tile_bytes(a);
  const int64_t depth = kDepth / a.group * a.group, unit = blocks ? step : min(a.group, a.kpad);
  const Tiles tiles(min(a.m, kSide), step);
  for (int64_t m0 = 0; m0 < a.m; m0 += kRowsAtOnce) {
    const int64_t rows = min(kRowsAtOnce, a.m - m0);
    for (int64_t t = t0; t < t1; t += 2) {
      const uint8_t* w[2];
      Part parts[2];
      for (int64_t i = 0; i < 2; i++)  // an odd last one meets x twice
        w[i] = (const uint8_t*)a.w + min(t + i, t1 - 1) * stride;
      for (int64_t k0 = 0; k0 < a.kpad; k0 += depth) {
        const int64_t k1 = min(k0 + depth, a.kpad);
        for (int64_t i = 0; i < 2; i++)
          (blocks ? unpack_blocks : unpack_integers<nested>)(a, w[i], k0, k1, codes[i], parts[i]);
        groups_of_rows(rows, [&](auto some, int64_t r) {
          constexpr int R = some.value;
          const int64_t first = m0 + r, own_rows = min(R * kSide, rows - r);
          const char* x = (const char*)a.xq + first * a.kpad;
          float* own = sums + r * kWidth;
          if (nested)
            return multiply_tiles<R, kind>(x + k0, a.kpad, codes[0], kTileBytes, (k1 - k0) / step,
                                           k0 == 0, own, step);
          if (k0 == 0) memset(own, 0, own_rows * kWidth * sizeof(float));
          for (int64_t k = k0; k < k1; k += unit) {
            multiply_tiles<R, kind>(x + k, a.kpad, codes[0] + (k - k0) * kSide, kTileBytes,
                                    min(unit, k1 - k) / step, true, dots, step);
            const int64_t g = (k - k0) / a.group;
            const vf scales[2] = {parts[0].scales[g], parts[1].scales[g]};
            const float* xs = a.xs + k / unit * a.m + first;
            for (int64_t i = 0; i < own_rows; i++)
              UNROLL
              for (int j = 0; j < 2; j++) {
                float* to = own + i * kWidth + j * 16;
                const vf factor = blocks ? scales[j] * xs[i] : scales[j];
                store(to, load<vf>(to) + to_float(load<vi>(dots + i * kWidth + j * 16)) * factor);
              }
          }
          if (!blocks) return;
          const float* group_sum = a.group_sum + k0 / a.group * a.m + first;
          for (int64_t i = 0; i < own_rows; i++)
            for (int64_t j = 0; j < 2; j++) {
              float* to = own + i * kWidth + j * 16;
              vf sum = load<vf>(to);
              for (int64_t k = k0, g = 0; k < k1; k += a.group, g++)
                sum += parts[j].zeros[g] * group_sum[g * a.m + i];
              store(to, sum);
            }
        });
      }
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < min(2, t1 - t); i++) {
          const int64_t m = m0 + r;
          const float* own = sums + r * kWidth + i * 16;
          vf line = load<vf>(own);
          if (nested) line = to_float(load<vi>(own) + parts[i].integers * a.offset[m]) * a.xs[m];
          else if (!blocks) line = (line + parts[i].weight * float(a.offset[m])) * a.xs[m];
          finish(a, m, (t + i) * 16, &line);
        }
    }
  }
}

void int4_tiles(const Linear& a, int64_t t0, int64_t t1) {
  if (a.m < kFewest || !a.kpad || a.group < kSmallestGroup || a.group > kDepth || a.kpad % a.block)
    return avx512::kernels.int4_tiles(a, t0, t1);
  product<Form::blocks>(a, t0, t1, a.block);
}

void int4dq_tiles(const Linear& a, int64_t t0, int64_t t1) {
  if (a.m < kFewest || !a.kpad || a.group > kDepth) return avx512::kernels.int4dq_tiles(a, t0, t1);
  const int64_t step = a.kpad % 64 || a.group % 64 ? 32 : 64;
  if (a.scales) product<Form::nested>(a, t0, t1, step);
  else product<Form::grouped>(a, t0, t1, step);
}

}  // namespace CPU_LEVEL
