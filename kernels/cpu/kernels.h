// What the operators (*_ops.cpp) and the kernels of one level (native.py) know of each other.
#pragma once
#include <stdint.h>

enum class Type : int { fp32, bf16, fp16 };

constexpr float kByteOnTop = 0x1p-24f;  // factor of x in int8_exact, which takes w times 2^24
constexpr int64_t kFewRows = 16;  // of x: up to here the products stream the weight themselves

// One product y [m, n] = x [m, k] W^T, in the forms that a kernel may need.
// Rows of x are padded with zeros to kpad. Quantized x comes in blocks of `block` columns.
struct Linear {
  const void* w;           // rows (float) or tiles (int8, int4)
  const float* x;          // fp32 [m, kpad]; else as widen_rows, bf16_panels, half_tiles say
  const float* group_sum;  // [groups, m] sum of x over each group of w
  const int8_t* xq;        // [m, kpad] codes of x, with room for whole 16 rows where they are more; of
                           // 16 bits as four_of (level.h) takes them
  const float* xs;         // [blocks, m] their scales
  const int32_t* offset;   // [blocks, m] minus the zero code of w times the sum of the codes of x;
                           // of unsigned codes: what to add to them, [m]
  const void* scales;      // [n] or null
  const void* bias;        // [n] of `type`, or null
  void* y;                 // [m, n] of `type`
  Type type, scale_type;
  int64_t m, n, k, kpad, block, blocks, group, groups;
};

// How x is quantized: to int8, s = amax / 127 of each block; to int8, s = max(amax / 127, 1e-5) of
// a row; to unsigned bytes, the same plus 128; or from the row's lowest to its highest number; to 16
// bits, s = amax / 32512 of each block, round(x / s) = 256 high + low of int8. Where rows have
// scales xs [m] already, the 16 bits are their integers x under these scales.
enum class Rounding : int { blocks, token, bytes, span, pairs };
constexpr int64_t kPairBlock = 64;

// Where quantized rows of activations go; see quantize_rows and unsigned_rows.
struct Quantized {
  int8_t* xq;
  float* xs;
  int32_t* offset;
  float* group_sum;
  int32_t zero_code;  // of the weight: 128 for int8 tiles, 8 for int4
  Rounding rounding;
};

// Attention of `tokens` new tokens and all heads of one (batch, kv head) over a stretch of slots.
// Row r is token r % tokens of head r / tokens; token t sees the slots up to first + t.
struct Attention {
  const float* q;  // [rows, d] fp32, times the softmax scale
  const void *k, *v;  // slot s at k + s * k_stride elements
  const float *k_scale, *v_scale;  // [slots] for an int8 cache, else null
  int64_t rows, tokens, first, d, k_stride, v_stride;
  Type type;  // of k and v, unless scales are given: then int8
  float *out, *max, *sum;  // [rows, padded(d)] weighted values, [rows] running max and sum
  float* scratch;  // attention_scratch(d) floats
};

constexpr int kAttentionBlock = 64;  // cache slots that attend() takes at a time
constexpr int64_t padded(int64_t d) { return (d + 31) / 32 * 32; }
constexpr int64_t attention_scratch(int64_t d) {
  return kAttentionBlock * (d + padded(d) + kAttentionBlock);
}

// A product with an n-bit weight: w = (value of the code - zero) * scale; see coded.cpp.
// Of `a`, x (padded to 32 columns), group_sum and, if x is quantized, xs [m] are used; in 16 bits,
// what quantize_rows leaves.
struct Coded {
  Linear a;
  const uint32_t* codes;        // [tiles, words, 16]: 32 columns are `bits` words, of sparse codes 2
  const uint32_t* positions;    // [tiles, blocks of 32 columns, 16] or null: 2:4 sparse codes
  const void* scales;           // [tiles, groups, 16]
  const uint8_t* zeros;         // [tiles, groups, 16] or null
  float table[32];              // value of the code's low 5 bits
  int bits, exponent_bits;      // exponent_bits > 0: codes are small floats
  bool integers;                // value = code + table[0]
  // else, where unit is not 0: value ~ unit * (256 high + low - 32768), with the bytes of each code
  uint8_t low[64], high[64];
  float unit;
  Type scale_type;
};

enum class Format : int { rows, int8, int4, coded };

struct Kernels {
  const char* name;
  int lanes;  // numbers of 32 bits in a vector
  // x [m, k] -> fp32 [m, kpad]; paired: in whatever form float_rows takes so many rows and columns
  void (*widen_rows)(const void* x, Type, int64_t m, int64_t k, int64_t kpad, bool paired, float*);
  void (*quantize_rows)(const void* x, const Linear&, const Quantized&, int64_t m0, int64_t m1);
  void (*float_rows)(const Linear&, int64_t n0, int64_t n1);
  void (*int8_tiles)(const Linear&, int64_t tile0, int64_t tile1);
  void (*int8_exact)(const Linear&, int64_t tile0, int64_t tile1);
  // x in 16 bits; null where int8_exact is as fast
  void (*int8_pairs)(const Linear&, int64_t tile0, int64_t tile1);
  void (*int4_tiles)(const Linear&, int64_t tile0, int64_t tile1);
  void (*int4_exact)(const Linear&, int64_t tile0, int64_t tile1);
  void (*int4dq_tiles)(const Linear&, int64_t tile0, int64_t tile1);  // a.scales: nested
  // panels of 32 outputs, many rows; scratch: kPanelWidth (kPanelDepth + m) floats
  void (*panels)(const Coded&, Format, int64_t panel0, int64_t panel1, float* scratch);
  // of all but rows, for bf16 x [m, k] as it is, zeros up to whole 16 rows of whole 32 columns, with
  // scales xs [m] or without; only coded needs more than c.a; null where there is no AMX
  void (*bf16_panels)(const Coded& c, Format, int64_t panel0, int64_t panel1);
  // rows of fp32 x [m, kpad] in place, and their scales [m]; mode 1: to integers of a span of 255;
  // 2: to e4m3; 3: to e4m3, all rows with one scale
  void (*round_rows)(float* x, int64_t m, int64_t kpad, int mode, float* scales);
  void (*coded_tiles)(const Coded&, int64_t tile0, int64_t tile1);
  // x in 16 bits, of sparse codes both bytes plus 128; null where coded_tiles is as fast
  void (*plane_pairs)(const Coded&, int64_t tile0, int64_t tile1);
  void (*sparse_pairs)(const Coded&, int64_t tile0, int64_t tile1);
  int lookup_bits;  // of codes up to so many bits plane_pairs looks values up
  // of small floats, a group a row, x [m, kpad] in bf16, of each four columns the middle two swapped;
  // null without AVX-512 BF16
  void (*half_tiles)(const Coded&, int64_t tile0, int64_t tile1);
  void (*attend)(const Attention&, int64_t begin, int64_t end);
  // Row r of `splits` parts of attend(), `stride` floats apart and starting with out [rows, padded],
  // max, sum -> y [d] at index `at`
  void (*merge)(const float* parts, int64_t splits, int64_t stride, int64_t rows, int64_t r,
                int64_t d, Type, void* y, int64_t at);
  float (*read_sum)(const void* p, int64_t bytes);
  // What lies between the products of a transformer block, on numbers of one type. Every result
  // is rounded to the type where the model's Python rounds it.
  // rows of x [m, k] over their root mean square, times weight [k]
  void (*rms_norm)(const void* x, const void* weight, Type, int64_t m, int64_t k, float eps, void* y);
  // one head x [d] by angles [d / 2]
  void (*rotate)(const void* x, Type, const float* cos, const float* sin, int64_t d, void* y);
  void (*silu_mul)(const void* gate, const void* up, Type, int64_t n, void* y);
  void (*add)(const void* a, const void* b, Type, int64_t n, void* y);
  // y = x * scale, bf16
  void (*multiply_scale)(const void* x, const void* scale, Type, int64_t n, void* y);
  // x [d] to int8 with s = max(amax / 127, 1e-5), s rounded to `scale_type`; returns s
  float (*quantize_slot)(const void* x, Type, int64_t d, Type scale_type, int8_t* codes);
};

constexpr int kPanelWidth = 32, kPanelDepth = 512;
