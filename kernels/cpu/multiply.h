// The fp32 product that everything with many rows comes down to, and the transposition it needs.
#pragma once
#include "level.h"

namespace CPU_LEVEL {

constexpr int kPass = 2 * kLanes;                   // outputs of a pass
constexpr int kPassRows = kLanes == 16 ? 12 : 6;    // rows whose sums fit the registers

// out [R, kPass] += x [R, depth] panel [depth, kPass]; each with its row stride. Of kPairs two bf16 numbers
// each are what is one number else.
template <int R, bool kPairs>
INLINE void multiply(const float* x, int64_t x_stride, const float* panel, int64_t panel_stride,
                     int64_t depth, float* out, int64_t out_stride) {
  vf sums[R][2];
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int v = 0; v < 2; v++) sums[r][v] = load<vf>(out + r * out_stride + v * kLanes);
  for (int64_t k = 0; k < depth; k++, panel += panel_stride) {
    vf w[2] = {load<vf>(panel), load<vf>(panel + kLanes)};
    UNROLL
    for (int r = 0; r < R; r++) {
      int32_t bits;
      memcpy(&bits, x + r * x_stride + k, 4);
      const vi one = splat(bits);
      UNROLL
      for (int v = 0; v < 2; v++)
        sums[r][v] = kPairs ? dot2(sums[r][v], (vu)w[v], (vu)one) : sums[r][v] + w[v] * (vf)one;
    }
  }
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int v = 0; v < 2; v++) store(out + r * out_stride + v * kLanes, sums[r][v]);
}

// out [m, width] += x [m, depth] panel [depth, width]; width: a multiple of kPass.
template <bool kPairs = false>
INLINE void multiply_all(int64_t m, int64_t width, const float* x, int64_t x_stride,
                         const float* panel, int64_t panel_stride, int64_t depth, float* out,
                         int64_t out_stride) {
  for (int64_t c = 0; c < width; c += kPass)
    each_row<kPassRows, 1>(0, 0, m, [&](auto rows, auto, int64_t, int64_t r) {
      multiply<rows.value, kPairs>(x + r * x_stride, x_stride, panel + c, panel_stride, depth,
                                   out + r * out_stride + c, out_stride);
    });
}

// Which lanes of two rows change places so that their off-diagonal blocks of h x h are swapped.
struct Swap {
  alignas(64) int32_t low[4][kLanes] = {}, high[4][kLanes] = {};
  constexpr Swap() {
    for (int level = 0, h = 1; h < kLanes; level++, h *= 2)
      for (int l = 0; l < kLanes; l++) {
        low[level][l] = l & h ? l - h + kLanes : l;
        high[level][l] = l & h ? l + kLanes : l + h;
      }
  }
};
static constexpr Swap kSwap;

template <int level = 0>
INLINE void transpose(vf (&rows)[kLanes]) {
  constexpr int h = 1 << level;
  if constexpr (h < kLanes) {
#if defined(__clang__)
    float square[kLanes][kLanes];
    memcpy(square, rows, sizeof square);
    for (int i = 0; i < kLanes; i++)
      for (int j = 0; j < kLanes; j++) rows[j][i] = square[i][j];
#else
    const vi low = load<vi>(kSwap.low[level]), high = load<vi>(kSwap.high[level]);
    UNROLL
    for (int i = 0; i < kLanes; i++)
      if (!(i & h)) {
        vf a = rows[i], b = rows[i + h];
        rows[i] = pick(a, b, low);
        rows[i + h] = pick(a, b, high);
      }
    transpose<level + 1>(rows);
#endif
  }
}

#if defined(__AVX512F__)
// To y: `count` outputs from `column` on, a vector of `sums` each, of the 16 rows from m on, a lane each.
INLINE void finish_transposed(const Linear& a, vf (&sums)[16], int64_t m, int64_t column,
                              int64_t count) {
  transpose(sums);
  for (int64_t r = 0; r < min(16, a.m - m); r++) {
    if (count == 16) {
      finish(a, m + r, column, &sums[r]);
      continue;
    }
    for (int64_t i = 0; i < count; i++) {
      const float bias = a.bias ? load_one(a.bias, a.type, column + i) : 0;
      store_one(a.y, a.type, (m + r) * a.n + column + i, sums[r][i] + bias);
    }
  }
}
#endif

}  // namespace CPU_LEVEL
