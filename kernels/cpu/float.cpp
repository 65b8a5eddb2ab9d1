// y = x W^T for one to a few rows of x and a row-major weight in bf16, fp16 or fp32.
//
// Four rows of W at a time stream through the registers, as far apart as they can: a stream then goes
// on where its row ends, and short ones leave the memory idle. Each weight is widened to fp32 and
// multiplied by every row of x. bf16 widens at one operation per vector: the even and the odd numbers of a 32-bit
// lane, so x lies "paired": kLanes even columns, then kLanes odd ones. With AVX-512 BF16 nothing is
// widened: one instruction multiplies the two numbers of each lane, and x stays bf16. From kTransposedRows rows
// on x is transposed there, 16 rows in the lanes of a vector, and meets one pair of a row of W at a time.
#include "multiply.h"

namespace CPU_LEVEL {

constexpr int kStep = 2 * kLanes;  // columns of W taken at a time
constexpr int kAhead = 1024;       // bytes; what lies nearer is on its way
#if defined(__AVX512BF16__)
constexpr bool kDot2 = true;
#else
constexpr bool kDot2 = false;
#endif

constexpr int64_t kTransposedRows = 9;  // of x: more than half of a vector's lanes

INLINE bool transposed(int64_t m) { return kDot2 && m >= kTransposedRows; }

template <Type type>
INLINE void widen(const char* p, vf& a, vf& b) {
  if constexpr (type == Type::bf16) {
    vu v = load<vu>(p);
    a = bf16_even(v);
    b = bf16_odd(v);
  } else if constexpr (type == Type::fp16) {
    a = fp16_load(p);
    b = fp16_load(p + 2 * kLanes);
  } else {
    a = load<vf>(p);
    b = load<vf>(p + 4 * kLanes);
  }
}

// Rows n0, n0 + apart, ... of W, R of them; M rows of x from m0 on.
template <Type type, int R, int M>
static void block(const Linear& a, int64_t n0, int64_t apart, int64_t m0) {
  constexpr int kBytes = type == Type::fp32 ? 4 : 2;
  const int64_t row_bytes = a.k * kBytes;
  vf even[R][M] = {}, odd[R][M] = {};
  const char* w = (const char*)a.w + n0 * a.k * kBytes;
  const float* x = a.x + m0 * a.kpad;
  auto step = [&](const char* rows, int64_t stride, int64_t k) __attribute__((always_inline)) {
    if constexpr (kDot2 && type == Type::bf16) {
      vu w2[R];
      UNROLL
      for (int r = 0; r < R; r++) {
        w2[r] = load<vu>(rows + r * stride);
        prefetch(rows + r * stride + kAhead);
      }
      UNROLL
      for (int m = 0; m < M; m++) {
        vu x2 = load<vu>((const uint16_t*)a.x + (m0 + m) * a.kpad + k);
        UNROLL
        for (int r = 0; r < R; r++) even[r][m] = dot2(even[r][m], w2[r], x2);
      }
      return;
    }
    vf wa[R], wb[R];
    UNROLL
    for (int r = 0; r < R; r++) {
      widen<type>(rows + r * stride, wa[r], wb[r]);
      prefetch(rows + r * stride + kAhead);
    }
    UNROLL
    for (int m = 0; m < M; m++) {
      vf xa = load<vf>(x + m * a.kpad + k), xb = load<vf>(x + m * a.kpad + k + kLanes);
      UNROLL
      for (int r = 0; r < R; r++) {
        even[r][m] += wa[r] * xa;
        // One chain per sum hides the latency where there are few sums.
        if constexpr (R * M <= 8) odd[r][m] += wb[r] * xb;
        else even[r][m] += wb[r] * xb;
      }
    }
  };
  int64_t k = 0;
  for (; k + kStep <= a.k; k += kStep) step(w + k * kBytes, apart * row_bytes, k);
  if (k < a.k) {
    char edge[R][kStep * kBytes] = {};
    for (int r = 0; r < R; r++)
      memcpy(edge[r], w + r * apart * row_bytes + k * kBytes, row_bytes - k * kBytes);
    step(edge[0], kStep * kBytes, k);
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float y = sum(even[r][m] + odd[r][m]);
      if (a.bias) y += load_one(a.bias, type, n0 + r * apart);
      store_one(a.y, type, (m0 + m) * a.n + n0 + r * apart, y);
    }
}

// Rows n0 .. n1 of W, R at a time.
template <Type type, int R>
static void rows(const Linear& a, int64_t n0, int64_t n1) {
  constexpr int kMost = kLanes == 16 ? 4 : 2;  // sums that fit the registers beside R weights
  const int64_t apart = (n1 - n0) / R;
  for (int64_t n = n0; n < n0 + apart; n++)
    each_row<kMost, 1>(0, 0, a.m, [&](auto m, auto, int64_t, int64_t row) {
      block<type, R, m.value>(a, n, apart, row);
    });
  if constexpr (R > 1) rows<type, 1>(a, n0 + apart * R, n1);
}

#if defined(__AVX512BF16__)
// out[16 g + r] = row n + r of W, bf16, times group g of G of 16 rows of x, transposed, from m on. One group
// has two sums, of even and odd pairs of columns.
template <int R, int G>
INLINE void dots_of_rows(const Linear& a, int64_t n, int64_t m, vf* out) {
  constexpr int kSums = 2 / G;
  const int64_t row = a.k * 2, group = a.kpad / 2 * 16;
  const char* w = (const char*)a.w + n * row;
  const uint32_t* x = (const uint32_t*)a.x + m / 16 * group;
  vf sums[kSums][R][G] = {};
  auto step = [&](int64_t k, vf (&into)[R][G]) __attribute__((always_inline)) {
    vu columns[G];
    UNROLL
    for (int g = 0; g < G; g++) columns[g] = load<vu>(x + g * group + k * 16);
    UNROLL
    for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, w + r * row + k * 4, 4);
      UNROLL
      for (int g = 0; g < G; g++) into[r][g] = dot2(into[r][g], (vu)splat(pair), columns[g]);
    }
  };
  int64_t k = 0;
  for (; k + kSums <= a.k / 2; k += kSums) {
    if (m == 0 && k % 16 == 0)
      for (int r = 0; r < R; r++) prefetch(w + (16 + r) * row + k * 4);
    UNROLL
    for (int i = 0; i < kSums; i++) step(k + i, sums[i]);
  }
  if (k < a.k / 2) step(k, sums[0]);
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int g = 0; g < G; g++) {
      vf sum = kSums > 1 ? sums[0][r][g] + sums[kSums - 1][r][g] : sums[0][r][g];
      if (a.k % 2)  // the last column alone
        sum += bf16_even(load<vu>(x + g * group + a.k / 2 * 16)) *
               load_one(w + r * row, Type::bf16, a.k - 1);
      out[g * 16 + r] = sum;
    }
}

// Rows n .. n + count of W, at most 16, times all rows of x.
static void sixteen_rows(const Linear& a, int64_t n, int64_t count) {
  vf sums[2][16] = {};
  for (int64_t m = 0; m < a.m; m += 32) {
    const bool two = m + 16 < a.m;
    int64_t at = 0;
    for (; at + 8 <= count; at += 8)
      (two ? dots_of_rows<8, 2> : dots_of_rows<8, 1>)(a, n + at, m, sums[0] + at);
    for (; at < count; at++)
      (two ? dots_of_rows<1, 2> : dots_of_rows<1, 1>)(a, n + at, m, sums[0] + at);
    finish_transposed(a, sums[0], m, n, count);
    if (two) finish_transposed(a, sums[1], m + 16, n, count);
  }
}
#endif

void float_rows(const Linear& a, int64_t n0, int64_t n1) {
#if defined(__AVX512BF16__)
  if (a.type == Type::bf16 && transposed(a.m)) {
    for (int64_t n = n0; n < n1; n += 16) sixteen_rows(a, n, min(16, n1 - n));
    return;
  }
#endif
  if (a.type == Type::bf16) rows<Type::bf16, 4>(a, n0, n1);
  else if (a.type == Type::fp16) rows<Type::fp16, 4>(a, n0, n1);
  else rows<Type::fp32, 4>(a, n0, n1);
}

void widen_rows(const void* x, Type type, int64_t m, int64_t k, int64_t kpad, bool paired,
                float* out) {
#if defined(__AVX512BF16__)
  if (paired && transposed(m)) {  // of 16 rows [kpad / 2, 16] pairs, then of the next
    for (int64_t r0 = 0; r0 < m; r0 += 16)
      for (int64_t i = 0; i < kpad; i += kStep, out += 16 * kLanes) {
        vf rows[16] = {};
        for (int64_t r = 0; r < min(16, m - r0); r++)
          memcpy(&rows[r], (const uint16_t*)x + (r0 + r) * k + i, min(kStep, k - i) * 2);
        transpose(rows);
        memcpy(out, rows, sizeof rows);
      }
    return;
  }
#endif
  if (paired && kDot2) {  // bf16 as it is
    for (int64_t r = 0; r < m; r++) {
      uint16_t* row = (uint16_t*)out + r * kpad;
      memcpy(row, (const uint16_t*)x + r * k, k * 2);
      memset(row + k, 0, (kpad - k) * 2);
    }
    return;
  }
  for (int64_t r = 0; r < m; r++, out += kpad) {
    int64_t i = 0;
    if (paired) {  // bf16 only
      const uint16_t* row = (const uint16_t*)x + r * k;
      for (; i < kpad; i += kStep) {
        uint16_t edge[kStep] = {};
        const uint16_t* p = row + i;
        if (i + kStep > k) p = (const uint16_t*)memcpy(edge, p, i < k ? (k - i) * 2 : 0);
        store(out + i, bf16_even(load<vu>(p)));
        store(out + i + kLanes, bf16_odd(load<vu>(p)));
      }
    } else {
      for (; i + kLanes <= k; i += kLanes) store(out + i, load_many(x, type, r * k + i));
      for (; i < k; i++) out[i] = load_one(x, type, r * k + i);
      for (; i < kpad; i++) out[i] = 0;
    }
  }
}

// The sum of a buffer as integers: nothing but a stream of reads. bytes: a multiple of 256.
float read_sum(const void* p, int64_t bytes) {
  vi a{}, b{}, c{}, d{};
  constexpr int kBytes = 4 * kLanes;
  const char* q = (const char*)p;
  for (int64_t i = 0; i < bytes; i += 4 * kBytes) {
    a += load<vi>(q + i);
    b += load<vi>(q + i + kBytes);
    c += load<vi>(q + i + 2 * kBytes);
    d += load<vi>(q + i + 3 * kBytes);
  }
  return sum(to_float(a + b + c + d));
}

}  // namespace CPU_LEVEL
