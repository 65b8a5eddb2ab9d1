// 4-bit codes in tiles that multiply bytes, one scale per row of x.
//
//   grouped   w = (c - 8) s, s bf16 per row and group            (int8dq-int4)
//   nested    w = round((c - 8) s) S, s fp16 per row and group, S fp32 per row   (w4a8)
//
// Tile t holds output rows 16 t .. 16 t + 15, group after group: 16 scales and the 16 sums of the
// group's integers (int16), then for each 32 columns 256 bytes: 16 bytes a row, column i in the low
// nibble of byte i, column 16 + i in its high one. Rows past the last repeat it. So 128 bits are
// one row, and a byte shuffle turns its codes into the integers by the row's own table of 16.
// With x = s_x (u + bottom), u in 0..255: sum x w = s_x (sum u w + bottom sum w).
#pragma once
#include "level.h"

namespace CPU_LEVEL {

constexpr int kColumns = 32, kChunkBytes = 256, kParams = 64;

// Entry `index` of the 16 in its own 128 bits, byte by byte; indices below 16.
INLINE vi lookup(vi table, vi index) {
#if defined(__AVX512F__)
  return (vi)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#elif defined(__AVX2__)
  return (vi)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#else
  uint8_t entries[16], at[16];
  memcpy(entries, &table, 16);
  memcpy(at, &index, 16);
  for (int i = 0; i < 16; i++) at[i] = entries[at[i]];
  return load<vi>(at);
#endif
}

// What the 16 codes stand for in each of a group's rows, as bytes: [16 rows][16].
INLINE void make_tables(const uint16_t* scales, int8_t* out) {
  float s[16];
  vf codes[kParts];
  for (int p = 0; p < kParts; p++) {
    store(s + p * kLanes, fp16_load(scales + p * kLanes));
    for (int i = 0; i < kLanes; i++) codes[p][i] = float(p * kLanes + i - 8);
  }
  for (int r = 0; r < 16; r++)
    for (int p = 0; p < kParts; p++)
      store8(out + r * 16 + p * kLanes, round_to_int(codes[p] * splat(s[r])));
}

INLINE int64_t tile_bytes(const Linear& a) {
  return a.kpad / kColumns * kChunkBytes + a.groups * kParams;
}

// A tile's tables of a group. Grouped: the same for all.
template <bool nested>
INLINE void load_tables(const uint8_t* params, vi (&tables)[4][kParts]) {
  alignas(64) int8_t entries[256];
  if (nested) make_tables((const uint16_t*)params, entries);
  else
    for (int i = 0; i < 256; i++) entries[i] = int8_t(i % 16 - 8);
  memcpy(tables, entries, sizeof entries);
}

}  // namespace CPU_LEVEL
