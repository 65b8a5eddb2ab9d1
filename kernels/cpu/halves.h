// Codes as pairs of bf16, for products that multiply the two numbers of each 32-bit lane.
//
// A vector of small floats holds four columns of 16 rows in its bytes (coded.h); it becomes two of
// pairs, of the even bytes and of the odd ones. So of each four columns of x the middle two are swapped.
#pragma once
#include "coded.h"

namespace CPU_LEVEL {

// What codes of `Bits` bits, E of them exponent, stand for.
template <int Bits, int E>
struct Halves {
  // Up to 6 bits a table has them, without their sign if they are 6. Of 7 and 8 bits the bits move to
  // their places, and a table has the subnormals, which are rare.
  static constexpr bool kTable = Bits <= 6;
  static constexpr float kFactor = kTable ? 1 : SmallFloat<E>::kFactor;
  static constexpr int kUp = kTable ? 0 : 8 - Bits;  // to the top of a byte
  static constexpr int M = 7 - E;                    // mantissa bits that are then in it
  __m512i table;

  explicit Halves(const Coded& c) {
    uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = to_bf16(c.table[i >> kUp] / kFactor);
    table = _mm512_loadu_si512(values);
  }

  INLINE void widen(__m512i v, vu& even, vu& odd) const {
    if constexpr (kTable) {
      __m512i a = _mm512_permutexvar_epi16(v, table);  // the index is a lane's lowest 5 bits
      __m512i b = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), table);
      even = (vu)a;
      odd = (vu)b;
      if constexpr (Bits == 6) {
        even = blend((vu)_mm512_slli_epi16(v, 10), 0x80008000u, even);
        odd = blend((vu)_mm512_slli_epi16(v, 2), 0x80008000u, odd);
      }
    } else {
      constexpr uint32_t mask = (0x8000 | 0x7f << (7 - M)) * 0x10001u;
      constexpr uint32_t base = (SmallFloat<E>::kBase << 7) * 0x10001u;
      constexpr int exponent = ((1 << E) - 1) << M;
      v = _mm512_slli_epi32(v, kUp);
      const __m512i low = _mm512_slli_epi16(v, 8);
      even = blend((vu)_mm512_srai_epi16(low, M + 1), mask, vu{} + base);
      odd = blend((vu)_mm512_srai_epi16(v, M + 1), mask, vu{} + base);
      if (__builtin_expect(_mm512_testn_epi8_mask(v, _mm512_set1_epi8(exponent)), 0)) {
        const __mmask32 first = _mm512_testn_epi16_mask(v, _mm512_set1_epi16(exponent));
        const __mmask32 second = _mm512_testn_epi16_mask(v, _mm512_set1_epi16(exponent << 8));
        even = subnormal(even, first, v);
        odd = subnormal(odd, second, _mm512_srli_epi16(v, 8));
      }
    }
  }

  // In the lanes of `where`: the sign of `value` and the magnitude of mantissa v.
  INLINE vu subnormal(vu value, __mmask32 where, __m512i v) const {
    const vu magnitude = (vu)_mm512_permutexvar_epi16(v, table);
    return (vu)_mm512_mask_mov_epi16((__m512i)value, where,
                                     (__m512i)blend(value, 0x80008000u, magnitude));
  }
};

// f(Int<bits>, Int<exponent bits>) of a small float.
template <class F>
INLINE void each_small_float(const Coded& c, const F& f) {
  unrolled<3, 9>([&](auto bits) {
    unrolled<2, 6>([&](auto e) {
      if constexpr (e.value + 2 <= bits.value)
        if (c.bits == bits.value && c.exponent_bits == e.value) f(bits, e);
    });
  });
}

}  // namespace CPU_LEVEL
