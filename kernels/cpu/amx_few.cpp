// Up to 16 rows of x on AMX tiles, in about the time of one: the weight streams through once.
//
//   int8          x in pairs of int8, codes as they lie: four columns of 16 rows are a row of AMX's B
//   small floats  x in bf16, codes widened as halves.h says: a vector of them is two rows of AMX's B
//   bf16          the weight's rows as they lie are AMX's A, and x is B: two neighbouring columns of 16
//                 rows of x lie together. Any number of rows
#include "amx.h"
#include "halves.h"
#include "multiply.h"

namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
decltype(CPU_LEVEL::widen_rows) widen_rows;
decltype(CPU_LEVEL::float_rows) float_rows;
decltype(CPU_LEVEL::half_tiles) half_tiles;
}  // namespace avx512bf16

namespace CPU_LEVEL {

// sums [16, 16] += the integers of block b, low + 256 high, plus what its zero code takes, times its
// scales.
INLINE void scale_block(const Linear& a, int64_t b, const int32_t (&dots)[2][256], float* sums) {
  for (int64_t m = 0; m < a.m; m++) {
    const vi whole = load<vi>(dots[0] + m * 16) + (load<vi>(dots[1] + m * 16) << 8);
    const vf line = to_float(whole + a.offset[b * a.m + m]) * a.xs[b * a.m + m];
    store(sums + m * 16, load<vf>(sums + m * 16) + line);
  }
}

INLINE void finish_tile(const Linear& a, int64_t tile, const float* sums) {
  for (int64_t m = 0; m < a.m; m++) {
    const vf line = load<vf>(sums + m * 16);
    finish(a, m, tile * 16, &line);
  }
}

void int8_pairs(const Linear& a, int64_t t0, int64_t t1) {
  if (a.m < kFewest || a.m > kFewRows || a.kpad % kPairBlock) return avx512::kernels.int8_pairs(a, t0, t1);
  constexpr int64_t kBytes = kPairBlock * 16;  // of a block of a tile
  const int64_t stride = a.kpad * 16;
  const int8_t *high = a.xq, *low = high + a.m * a.kpad;
  alignas(64) int32_t dots[2][2][256];  // [tile][low, high]
  alignas(64) float sums[2][256];
  const Tiles tiles(a.m);
  for (int64_t t = t0; t < t1; t += 2) {
    const int64_t count = min(2, t1 - t);
    memset(sums, 0, sizeof sums);
    for (int64_t b = 0; b < a.blocks; b++) {
      const char* w = (const char*)a.w + t * stride + b * kBytes;
      for (int64_t i = 0; i < kBytes; i += 64) {
        prefetch(w + 2 * stride + i);
        prefetch(w + 3 * stride + i);
      }
      TILE_LOAD(4, low + b * kPairBlock, a.kpad);
      TILE_LOAD(5, high + b * kPairBlock, a.kpad);
      TILE_LOAD(6, w, 64);
      TILE_LOAD(7, w + (count - 1) * stride, 64);
      zero_sums();
      TILE_DOT("tdpbsud", 0, 4, 6);
      TILE_DOT("tdpbsud", 1, 5, 6);
      TILE_DOT("tdpbsud", 2, 4, 7);
      TILE_DOT("tdpbsud", 3, 5, 7);
      store_sums(dots[0][0], dots[0][1], dots[1][0], dots[1][1]);
      for (int i = 0; i < 2; i++) scale_block(a, b, dots[i], sums[i]);
    }
    for (int64_t i = 0; i < count; i++) finish_tile(a, t + i, sums[i]);
  }
}

constexpr int64_t kChunk = 2 * kBlock;      // columns that are widened at a time, of two tiles
constexpr int64_t kBlockBytes = kBlock * 32;  // of a block of one tile, in bf16

// Columns k0 .. k1 of `count` tiles: of each block the first tile, then the second.
template <class Value, int Bits>
INLINE void widen_chunk(const Value& value, const uint32_t* codes, int64_t stride, int64_t count,
                        int64_t k0, int64_t k1, char* out) {
  for (int64_t k = k0; k < k1; k += kBlock, out += 2 * kBlockBytes)
    for (int64_t t = 0; t < count; t++) {
      const uint32_t* block = codes + t * stride + k / kBlock * Bits * 16;
      UNROLL
      for (int line = 0; line < Bits; line++) prefetch(block + 2 * stride + line * 16);
      unrolled<0, kBlock / 4>([&](auto step) __attribute__((always_inline)) {
        char* to = out + t * kBlockBytes + step.value * 128;
        vu even, odd;
        value.widen((__m512i)four_codes<Bits, step.value>(block, 0), even, odd);
        store(to, even);
        store(to + 64, odd);
      });
    }
}

template <int Bits, int E>
static void product(const Coded& c, int64_t t0, int64_t t1) {
  using Value = Halves<Bits, E>;
  const Linear& a = c.a;
  const Value value(c);
  const auto* x = (const uint16_t*)a.x;
  const int64_t stride = a.kpad / kBlock * Bits * 16, x_stride = a.kpad * 2;
  alignas(64) static thread_local char panels[2][4 * kBlockBytes];
  alignas(64) float sums[2][2][kFewRows * 16];  // [tile][first block, second]
  const Tiles tiles(a.m);
  for (int64_t t = t0; t < t1; t += 2) {
    const int64_t count = min(2, t1 - t);
    const Tile first(c, t), last(c, t + count - 1);
    auto widen = [&](int64_t k) __attribute__((always_inline)) {
      widen_chunk<Value, Bits>(value, first.codes, stride, count, k, min(k + kChunk, a.kpad),
                               panels[k / kChunk % 2]);
    };
    zero_sums();
    widen(0);
    for (int64_t k = 0; k < a.kpad; k += kChunk) {
      if (k + kChunk < a.kpad) widen(k + kChunk);
      const char* panel = panels[k / kChunk % 2];
      TILE_LOAD(4, x + k, x_stride);
      TILE_LOAD(6, panel, 64);
      TILE_LOAD(7, panel + kBlockBytes, 64);
      TILE_DOT("tdpbf16ps", 0, 4, 6);
      TILE_DOT("tdpbf16ps", 1, 4, 7);
      if (k + kBlock == a.kpad) break;
      TILE_LOAD(5, x + k + kBlock, x_stride);
      TILE_LOAD(6, panel + 2 * kBlockBytes, 64);
      TILE_LOAD(7, panel + 3 * kBlockBytes, 64);
      TILE_DOT("tdpbf16ps", 2, 5, 6);
      TILE_DOT("tdpbf16ps", 3, 5, 7);
    }
    store_sums(sums[0][0], sums[1][0], sums[0][1], sums[1][1]);
    for (int64_t i = 0; i < count; i++) {
      const vf scale = (i ? last : first).scale(c, 0, 0) * Value::kFactor;
      for (int64_t m = 0; m < a.m; m++) {
        const vf sum = load<vf>(sums[i][0] + m * 16) + load<vf>(sums[i][1] + m * 16);
        store(sums[i][0] + m * 16, sum * (a.xs ? scale * a.xs[m] : scale));
      }
      finish_tile(a, t + i, sums[i][0]);
    }
  }
}

void half_tiles(const Coded& c, int64_t t0, int64_t t1) {
  if (c.a.m == 1 || c.a.m > kFewRows) return avx512bf16::half_tiles(c, t0, t1);
  each_small_float(c, [&](auto bits, auto e) { product<bits.value, e.value>(c, t0, t1); });
}

constexpr int64_t kColumns = 32;  // of bf16, a row of a tile

static bool meets_rows(int64_t m, int64_t k) { return m >= kFewest && k % kColumns == 0; }

// For float_rows: of the first 16 rows of x [m, k], or all if they are fewer, and each 32 columns,
// [16, rows] pairs of them; then of the next 16, with zeros behind the last row.
void widen_rows(const void* x, Type type, int64_t m, int64_t k, int64_t kpad, bool paired,
                float* out) {
  if (!paired || !meets_rows(m, k)) return avx512bf16::widen_rows(x, type, m, k, kpad, paired, out);
  const int64_t width = min(m, 16);
  const auto keep = __mmask16((1 << width) - 1);
  for (int64_t m0 = 0; m0 < m; m0 += 16)
    for (int64_t c = 0; c < k; c += kColumns) {
      vf rows[16] = {};
      for (int64_t r = 0; r < min(16, m - m0); r++)
        rows[r] = load<vf>((const uint16_t*)x + (m0 + r) * k + c);
      transpose(rows);
      for (int i = 0; i < 16; i++, out += width) _mm512_mask_storeu_ps(out, keep, (__m512)rows[i]);
    }
}

// `rows` rows of W from n on and, of two streams, as many from n + apart on, against rows of x from m0
// on: 16, of two groups 32, or what is left of them. One group has two sums, of even and odd steps.
template <int S, int G>
INLINE void row_tiles(const Linear& a, int64_t n, int64_t rows, int64_t apart, int64_t m0) {
  const int64_t stride = a.k * 2, x_stride = min(a.m, 16) * 4, steps = a.k / kColumns;
  const char *x = (const char*)a.x + m0 * stride, *first = (const char*)a.w + n * stride;
  const char *behind = x + 16 * stride, *second = first + apart * stride;
  alignas(64) vf sums[2][2][16];  // [stream][group, or odd]
  auto ask = [&](int64_t i) __attribute__((always_inline)) {  // for the next rows, as they lie
    for (int64_t p = 16 * stride + i * 1024, end = p + 1024; m0 == 0 && p < end; p += 64) {
      prefetch(first + p);
      if (S == 2) prefetch(second + p);
    }
  };
  zero_sums();
  for (int64_t i = 0; i < steps; i++) {
    ask(i);
    TILE_LOAD(4, x + i * 16 * x_stride, x_stride);
    TILE_LOAD(6, first + i * 64, stride);
    if (S == 2) TILE_LOAD(7, second + i * 64, stride);
    TILE_DOT("tdpbf16ps", 0, 6, 4);
    if (S == 2) TILE_DOT("tdpbf16ps", 2, 7, 4);
    if (G == 2) {
      TILE_LOAD(5, behind + i * 16 * x_stride, x_stride);
    } else {
      if (++i == steps) break;
      ask(i);
      TILE_LOAD(5, x + i * 16 * x_stride, x_stride);
      TILE_LOAD(6, first + i * 64, stride);
      if (S == 2) TILE_LOAD(7, second + i * 64, stride);
    }
    TILE_DOT("tdpbf16ps", 1, 6, 5);
    if (S == 2) TILE_DOT("tdpbf16ps", 3, 7, 5);
  }
  store_sums(sums[0][0], sums[0][1], sums[1][0], sums[1][1]);
  for (int s = 0; s < S; s++) {
    for (int r = 0; G == 1 && r < 16; r++) sums[s][0][r] += sums[s][1][r];
    for (int g = 0; g < G; g++) finish_transposed(a, sums[s][g], m0 + g * 16, n + s * apart, rows);
  }
}

// The same rows of W against all rows of x.
template <int S>
INLINE void all_rows(const Linear& a, int64_t n, int64_t rows, int64_t apart) {
  for (int64_t m = 0; m < a.m; m += 32) {
    if (m + 16 < a.m) row_tiles<S, 2>(a, n, rows, apart, m);
    else row_tiles<S, 1>(a, n, rows, apart, m);
  }
}

void float_rows(const Linear& a, int64_t n0, int64_t n1) {
  if (a.type != Type::bf16 || !meets_rows(a.m, a.k)) return avx512bf16::float_rows(a, n0, n1);
  const int64_t apart = (n1 - n0) / 32 * 16;
  const TileShape x{16, min(a.m, 16) * 4};
  {
    const Tiles tiles(x, x, {16, 64});
    for (int64_t n = n0; n < n0 + apart; n += 16) all_rows<2>(a, n, 16, apart);
  }
  for (int64_t n = n0 + 2 * apart; n < n1; n += 16) {
    const int64_t rows = min(16, n1 - n);
    const Tiles tiles({rows, x.bytes}, x, {rows, 64});
    all_rows<1>(a, n, rows, 0);
  }
}

}  // namespace CPU_LEVEL
