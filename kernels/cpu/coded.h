// What the products of n-bit codes share: where a tile's parts lie, and codes out of bit planes.
//
// Codes of n < 8 bits lie in planes: 32 columns of 16 rows are n lines of 64 bytes, 4 of them with the
// codes' lowest 4 bits, 2 with the next 2, 1 with the next, as n is a sum of these. Byte 4 r + i of a
// line belongs to row r and the columns i, 4 + i, 8 + i ...: as many as it has room for, the first one
// lowest. So shifts by constants bring four columns of all rows into the bytes of a vector, the form of
// the VNNI product. Codes of 8 bits are such bytes themselves.
//
// Of 2:4 codes only the kept half is there, as signed numbers, in planes like other codes of 4 bits; in
// `positions` are their columns among four, in planes like codes of 2 bits. So four codes are of eight
// columns, bytes 0 and 1 of the first four, and a block of codes is two blocks of columns.
#pragma once
#include "level.h"

namespace CPU_LEVEL {

constexpr int kBlock = 32;  // columns of a block of codes

template <int I, int End, class F>
INLINE void unrolled(const F& f) {
  if constexpr (I < End) {
    f(Int<I>{});
    unrolled<I + 1, End>(f);
  }
}

// (a & mask) | c
INLINE vu blend(vu a, uint32_t mask, vu c) {
#if defined(__AVX512F__)
  return (vu)_mm512_ternarylogic_epi32((__m512i)a, _mm512_set1_epi32(mask), (__m512i)c, 0xEA);
#else
  return (a & mask) | c;
#endif
}

// c | a plane's bits of the columns 4 step .. 4 step + 3, each in its byte.
template <int Bits, int Plane, int step>
INLINE vu with_plane(const uint32_t* block, int p, vu c) {
  if constexpr (!(Bits & Plane)) return c;
  constexpr int below = Bits & ~(2 * Plane - 1);  // bits of a code, and lines, before this plane's
  constexpr int fields = 8 / Plane, shift = step % fields * Plane;
  constexpr uint32_t mask = ((1u << Plane) - 1) * 0x01010101u << below;
  const vu v = load<vu>(block + (below + step / fields) * 16 + p * kLanes);
  return blend(shift > below ? v >> (shift - below) : v << (below - shift), mask, c);
}

// Columns 4 step .. 4 step + 3 of a block, part p of the 16 rows, a code in each byte.
template <int Bits, int step>
INLINE vu four_codes(const uint32_t* block, int p) {
  if constexpr (Bits == 8) return load<vu>(block + step * 16 + p * kLanes);
  const vu low = with_plane<Bits, 4, step>(block, p, vu{});
  return with_plane<Bits, 1, step>(block, p, with_plane<Bits, 2, step>(block, p, low));
}

// Small floats of E exponent bits become fp32 or bf16 by their bits' places, with exponents that are
// too small by a power of two: the product is to be multiplied with that.
template <int E>
struct SmallFloat {
  static constexpr int kBias = (1 << (E - 1)) - 1, kBase = (127 >> E) << E;  // of 8 bits, E are free
  static constexpr float kFactor = float(int64_t(1) << (127 - kBase - kBias));
};

// Where a tile's parts lie.
struct Tile {
  const uint32_t *codes, *positions;
  const char* scales;
  const uint8_t* zeros;

  Tile(const Coded& c, int64_t tile) {
    const int64_t blocks = c.a.kpad / kBlock, at = tile * c.a.groups * 16;
    codes = c.codes + tile * blocks * words(c) * 16;
    positions = c.positions ? c.positions + tile * blocks * 16 : nullptr;
    scales = (const char*)c.scales + at * (c.scale_type == Type::fp32 ? 4 : 2);
    zeros = c.zeros ? c.zeros + at : nullptr;
  }
  static int64_t words(const Coded& c) { return c.positions ? 2 : c.bits; }

  vf scale(const Coded& c, int64_t group, int p) const {
    return load_many(scales, c.scale_type, group * 16 + p * kLanes);
  }
  vf zero(int64_t group, int p) const {
    typedef uint8_t bytes __attribute__((vector_size(kLanes)));
    if (!zeros) return vf{};
    return to_float(__builtin_convertvector(load<bytes>(zeros + group * 16 + p * kLanes), vi));
  }
};

}  // namespace CPU_LEVEL
