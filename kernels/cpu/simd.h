// Vectors of kLanes 32-bit numbers, as wide as this file's compiler flags allow.
//
// Every kernel file is compiled once per level that it serves (native.py) with CPU_LEVEL naming the
// namespace, and set_cpu_level picks a level at run time. Nothing from the C++ library or from torch is
// included here: an inline function compiled for AVX-512 could otherwise be the copy that the linker
// keeps for every level.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE inline __attribute__((always_inline))

namespace CPU_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kParts = 16 / kLanes;  // vectors in one tile row of 16 outputs

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef int8_t vb __attribute__((vector_size(kLanes)));

template <class V, class T>
INLINE V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
INLINE void store(T* p, V v) {
  memcpy(p, &v, sizeof(V));
}
// Ask for the line at p: the weights' streams are short, and the hardware loses each at its end.
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
INLINE vf splat(float x) { return x - vf{}; }
INLINE vi splat(int32_t x) { return x - vi{}; }
INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
INLINE vf max(vf a, vf b) { return a > b ? a : b; }
INLINE float max(float a, float b) { return a > b ? a : b; }
// Of magnitudes, whose bits are ordered as they are: a NaN counts as the largest.
INLINE float larger(float a, float b) {
  uint32_t x, y;
  memcpy(&x, &a, 4);
  memcpy(&y, &b, 4);
  return x << 1 > y << 1 ? a : b;
}
// Not below the smallest scale of activations; a NaN stays one.
INLINE float at_least(float scale, float least) { return scale < least ? least : scale; }
INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Lane i is number from[i] of a and b one after the other.
INLINE vf pick(vf a, vf b, vi from) {
#if defined(__clang__)
  float both[2 * kLanes];
  store(both, a);
  store(both + kLanes, b);
  for (int i = 0; i < kLanes; i++) a[i] = both[from[i]];
  return a;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// The two bf16 numbers of each 32-bit lane: even (low half) and odd (high half).
INLINE vf bf16_even(vu v) { return (vf)(v << 16); }
INLINE vf bf16_odd(vu v) { return (vf)(v & 0xffff0000u); }
// acc += the odd, then the even product of the bf16 numbers of each 32-bit lane.
INLINE vf dot2(vf acc, vu w, vu x) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
  acc += bf16_odd(w) * bf16_odd(x);
  return acc + bf16_even(w) * bf16_even(x);
#endif
}
// kLanes 16-bit or signed 8-bit integers widened, and back. (Compilers split the generic form.)
INLINE vu widen16(const void* p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  return __builtin_convertvector(load<vh>((const char*)p), vu);
#endif
}
INLINE vi widen8(const int8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return __builtin_convertvector(load<vb>(p), vi);
#endif
}
INLINE void store16(void* p, vu v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
#else
  store((char*)p, __builtin_convertvector(v, vh));
#endif
}

INLINE void store8(int8_t* p, vi v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
  const __m256i lowest = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m256i fours = _mm256_shuffle_epi8((__m256i)v, lowest);
  _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(fours),
                                                   _mm256_extracti128_si256(fours, 1)));
#else
  store(p, __builtin_convertvector(v, vb));
#endif
}

// kLanes bf16 numbers in order.
INLINE vf bf16_load(const void* p) { return (vf)(widen16(p) << 16); }

// kLanes fp16 numbers. Without F16C: the bits moved into fp32 place are off by 2^112.
INLINE vf fp16_load(const void* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vu h = widen16(p);
  vf small = (vf)((h & 0x7fffu) << 13) * 0x1p112f;
  vu special = (vu)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // infinity and NaN
  return (vf)((vu)small | special | ((h & 0x8000u) << 16));
#endif
}

INLINE float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float half[kLanes];
  store(half, v);
  UNROLL
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) half[i] += half[i + n];
  return half[0];
#endif
}

INLINE int32_t sum(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t out = 0;
  for (int i = 0; i < kLanes; i++) out += v[i];
  return out;
#endif
}

INLINE int32_t max_of(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t out = v[0];
  for (int i = 1; i < kLanes; i++) out = v[i] > out ? v[i] : out;
  return out;
#endif
}

INLINE float max_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float out = v[0];
  for (int i = 1; i < kLanes; i++) out = max(out, v[i]);
  return out;
#endif
}

// acc += the four products of unsigned bytes w and signed bytes x in each 32-bit lane. Exact.
INLINE vi dot4(vi acc, vi w, vi x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#elif defined(__AVX2__)
  // Pairs of 16-bit products: maddubs would saturate with w above 127.
  __m256i low = _mm256_set1_epi16(255);
  __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)w, low),
                                   _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8),
                                  _mm256_srai_epi16((__m256i)x, 8));
  return acc + (vi)_mm256_add_epi32(even, odd);
#else
  UNROLL
  for (int i = 0; i < 4; i++) acc += ((w >> (8 * i)) & 255) * ((x << (24 - 8 * i)) >> 24);
  return acc;
#endif
}

// The same where two products of neighbours are less than 2^15 together.
INLINE vi dot4_small(vi acc, vi w, vi x) {
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512VNNI__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
  return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  return dot4(acc, w, x);
#endif
}

// The nearest integer of |x| < 2^22, ties to even: adding 1.5 * 2^23 leaves it in the mantissa.
INLINE vi round_to_int(vf x) { return (vi)(x + 12582912.0f) - 0x4b400000; }

// The lowest and the highest of many numbers and 0; `most` is NaN if any is NaN or infinite.
struct Range {
  vf low{}, high{}, doubt{};
  INLINE void add(vf v) {
    low = v < low ? v : low;
    high = max(high, v);
    doubt += v - v;
  }
  float least() const { return -max_of(-low); }
  float most() const { return max_of(high) + sum(doubt); }
  float magnitude() const { return larger(-least(), most()); }
  // Asymmetric int8: the scale of 255 steps, and round(least / scale), at least -255.
  float scale() const { return at_least((most() - least()) / 255, 1.1920929e-7f); }
  int32_t bottom(float scale) const {
    const int32_t q = round_to_int(splat(least()) / splat(scale))[0];  // rounds as vectors do
    return q < -255 ? -255 : q > 0 ? 0 : q;
  }
};

// e^x for x <= 0: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2]; relative error 2e-7.
INLINE vf exp(vf x) {
  x = max(x, splat(-87.0f));
  vi n = round_to_int(x * 1.44269504f);
  vf r = x - to_float(n) * 0.693359375f + to_float(n) * 2.12194440e-4f;
  vf p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (vf)((n + 127) << 23);
}

INLINE float half_bits_to_float(uint16_t h, Type type) {
  if (type == Type::bf16) {
    uint32_t bits = uint32_t(h) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
  }
  uint16_t line[kLanes] = {h};
  return fp16_load(line)[0];
}

INLINE float load_one(const void* p, Type type, int64_t i) {
  if (type == Type::fp32) return ((const float*)p)[i];
  return half_bits_to_float(((const uint16_t*)p)[i], type);
}

INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return x == x ? uint16_t(rounded) : 0x7fc0;
}

INLINE uint16_t to_fp16(float x) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(x, 0));
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits >= 0x47800000) return sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (bits < 0x38800000) {  // below 2^-14: the sum's last bit is worth 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  return uint16_t(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13));
#endif
}

INLINE void store_one(void* p, Type type, int64_t i, float x) {
  if (type == Type::fp32) ((float*)p)[i] = x;
  else ((uint16_t*)p)[i] = type == Type::bf16 ? to_bf16(x) : to_fp16(x);
}

// kLanes numbers of any type from p[i] on, and back.
INLINE vf load_many(const void* p, Type type, int64_t i) {
  if (type == Type::fp32) return load<vf>((const float*)p + i);
  const uint16_t* half = (const uint16_t*)p + i;
  return type == Type::bf16 ? bf16_load(half) : fp16_load(half);
}

INLINE void store_many(void* p, Type type, int64_t i, vf x) {
  if (type == Type::fp32) {
    store((float*)p + i, x);
  } else if (type == Type::bf16) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = x == x ? rounded : vu{} + 0x7fc0;
    store16((uint16_t*)p + i, rounded);
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)((uint16_t*)p + i), _mm512_cvtps_ph(x, 0));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)((uint16_t*)p + i), _mm256_cvtps_ph(x, 0));
#else
    for (int j = 0; j < kLanes; j++) ((uint16_t*)p)[i + j] = to_fp16(x[j]);
#endif
  }
}

// Write 16 (or, at the edge, fewer) outputs: y = sums * scales + bias; scales, bias may be null.
INLINE void finish(const Linear& a, int64_t row, int64_t col, const vf* sums) {
  if (col + 16 <= a.n) {
    UNROLL
    for (int p = 0; p < kParts; p++) {
      int64_t i = col + p * kLanes;
      vf out = a.scales ? sums[p] * load_many(a.scales, a.scale_type, i) : sums[p];
      if (a.bias) out += load_many(a.bias, a.type, i);
      store_many(a.y, a.type, row * a.n + i, out);
    }
  } else {
    float line[16];
    memcpy(line, sums, sizeof line);
    for (int64_t i = col; i < a.n; i++) {
      float out = a.scales ? line[i - col] * load_one(a.scales, a.scale_type, i) : line[i - col];
      if (a.bias) out += load_one(a.bias, a.type, i);
      store_one(a.y, a.type, row * a.n + i, out);
    }
  }
}

}  // namespace CPU_LEVEL
