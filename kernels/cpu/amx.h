// Matrices of up to 16 rows of 64 bytes: sums in tiles 0 .. 3, x in 4 and 5, weights in 6 and 7.
// In assembly, for the compilers' own functions do not say which memory they touch.
#pragma once
#include "level.h"

namespace CPU_LEVEL {

#define TILE_LOAD(t, p, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"(int64_t(stride)) : "memory")
#define TILE_STORE(t, p, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"(int64_t(stride)) : "memory")
#define TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::: "memory")
#define TILE_DOT(op, c, a, b) \
  asm volatile(op " %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

INLINE void zero_sums() {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
}

// Each [16, 16] numbers of 32 bits.
INLINE void store_sums(void* first, void* second, void* third, void* fourth) {
  TILE_STORE(0, first, 64);
  TILE_STORE(1, second, 64);
  TILE_STORE(2, third, 64);
  TILE_STORE(3, fourth, 64);
}

struct TileShape {
  int64_t rows, bytes;  // at most 16, 64
};

// The tiles, while this lives.
struct Tiles {
  Tiles(TileShape sums, TileShape x, TileShape weight) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; t++) {
      const TileShape shape = t < 4 ? sums : t < 6 ? x : weight;
      config.row_bytes[t] = uint16_t(shape.bytes);
      config.rows[t] = uint8_t(shape.rows);
    }
    asm volatile("ldtilecfg (%0)" ::"r"(&config) : "memory");
  }
  // For x [rows, bytes] times a weight of 16 outputs: so many rows of x, so many bytes of one at a time.
  explicit Tiles(int64_t rows = 16, int64_t bytes = 64)
      : Tiles({rows, 64}, {rows, bytes}, {bytes / 4, 64}) {}
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
};

constexpr int64_t kFewest = 5;  // fewer rows of x meet the weight as fast without AMX
constexpr int64_t kSide = 16, kWidth = 2 * kSide;  // rows of a tile; outputs at a time

// Of the weight; x is in bytes of the named kind, or in bf16.
enum class Weight { unsigned_for_signed, signed_for_unsigned, signed_for_signed, bf16, two_bf16 };

#define DOT_BOTH(op)       \
  if (second) {            \
    TILE_DOT(op, 2, 5, 6); \
    TILE_DOT(op, 3, 5, 7); \
  } else {                 \
    TILE_DOT(op, 0, 4, 6); \
    TILE_DOT(op, 1, 4, 7); \
  }

// Sums 0 and 1, or 2 and 3, += the first tile of x, or the second, times both of the weight.
template <Weight kind, bool second>
INLINE void dot_both() {
  if constexpr (kind == Weight::unsigned_for_signed) { DOT_BOTH("tdpbsud") }
  else if constexpr (kind == Weight::signed_for_unsigned) { DOT_BOTH("tdpbusd") }
  else if constexpr (kind == Weight::signed_for_signed) { DOT_BOTH("tdpbssd") }
  else { DOT_BOTH("tdpbf16ps") }
}

constexpr int64_t kSumsStride = kWidth * 4;

// Sums 0 and 1 to the first 16 rows of `sums` [16 R, kWidth], 2 and 3 to the next.
template <int R>
INLINE void store_rows(void* sums) {
  char *low = (char*)sums, *high = low + kSide * kSumsStride;
  TILE_STORE(0, low, kSumsStride);
  TILE_STORE(1, low + 64, kSumsStride);
  if (R == 2) TILE_STORE(2, high, kSumsStride);
  if (R == 2) TILE_STORE(3, high + 64, kSumsStride);
}

// sums [16 R, kWidth] = x [16 R, steps * step bytes] times two columns of the weight's tiles, which lie
// w_apart bytes apart; added to what is in sums unless `fresh`. Of two_bf16 the second numbers lie
// behind the first ones of both columns.
template <int R, Weight kind>
INLINE void multiply_tiles(const char* x, int64_t x_stride, const char* w, int64_t w_apart,
                           int64_t steps, bool fresh, void* sums, int64_t step = 64) {
  char *low = (char*)sums, *high = low + kSide * kSumsStride;
  if (fresh) {
    zero_sums();
  } else {
    TILE_LOAD(0, low, kSumsStride);
    TILE_LOAD(1, low + 64, kSumsStride);
    if (R == 2) TILE_LOAD(2, high, kSumsStride);
    if (R == 2) TILE_LOAD(3, high + 64, kSumsStride);
  }
  for (int64_t i = 0; i < steps; i++, x += step, w += kSide * step) {
    TILE_LOAD(4, x, x_stride);
    if (R == 2) TILE_LOAD(5, x + kSide * x_stride, x_stride);
    for (int part = 0; part < (kind == Weight::two_bf16 ? 2 : 1); part++) {
      TILE_LOAD(6, w + part * 2 * w_apart, 64);
      TILE_LOAD(7, w + part * 2 * w_apart + w_apart, 64);
      dot_both<kind, false>();
      if (R == 2) dot_both<kind, true>();
    }
  }
  store_rows<R>(sums);
}

// f(Int<R>, row) over the rows of x, 32 or 16 at a time: of the last ones some may be past m.
template <class F>
INLINE void groups_of_rows(int64_t m, const F& f) {
  int64_t row = 0;
  for (; row + kSide < m; row += kWidth) f(Int<2>{}, row);
  if (row < m) f(Int<1>{}, row);
}

}  // namespace CPU_LEVEL
