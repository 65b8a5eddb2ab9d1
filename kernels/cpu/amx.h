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

}  // namespace CPU_LEVEL
