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

// The tiles, while this lives: of so many rows of x, and of so many bytes of one of them at a time.
struct Tiles {
  explicit Tiles(int64_t rows = 16, int64_t bytes = 64) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 0, 0, 64, 64};
      uint8_t rows[16] = {};
    } config;
    config.row_bytes[4] = config.row_bytes[5] = uint16_t(bytes);
    for (int t = 0; t < 8; t++) config.rows[t] = uint8_t(t < 6 ? rows : bytes / 4);
    asm volatile("ldtilecfg (%0)" ::"r"(&config) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
};

}  // namespace CPU_LEVEL
