// The likeliest token: the first of the largest of a row of logits.
#pragma once
#include <algorithm>
#include <limits>

#include "ops.h"

// Bits of a floating-point number as an integer of the same order.
template <class T>
T ordered(T bits) {
  return bits < 0 ? bits ^ std::numeric_limits<T>::max() : bits;
}

template <class T>
int64_t first_largest(const T* bits, int64_t n) {
  constexpr int64_t kBlock = 256;
  T most = std::numeric_limits<T>::min();
  int64_t at = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    T here = std::numeric_limits<T>::min();
    const int64_t end = std::min(i + kBlock, n);
#pragma omp simd reduction(max : here)
    for (int64_t j = i; j < end; j++) here = std::max(here, ordered(bits[j]));
    if (here > most) {
      most = here;
      at = i;
    }
  }
  while (ordered(bits[at]) != most) at++;
  return at;
}

// Of n > 0 numbers of a type at p.
inline int64_t first_largest(const void* p, Type type, int64_t n) {
  return type == Type::fp32 ? first_largest(static_cast<const int32_t*>(p), n)
                            : first_largest(static_cast<const int16_t*>(p), n);
}
