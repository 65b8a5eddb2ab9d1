// What the operators of products share: the checks, the result, and the split over threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>

#include "ops.h"

using at::Tensor;
using OptTensor = const std::optional<Tensor>&;

// The n-bit weight of a product whose k, n and types are set; tensors as the modules repack them.
Coded describe_coded(const Linear& product, const Tensor& tiles, const Tensor& scales,
                     OptTensor zeros, OptTensor positions, const Tensor& table, int64_t bits,
                     int64_t group, int64_t exponent_bits);
// How few rows of x meet an n-bit weight: in fp32, in 16 bits (pairs of int8), or in bf16.
enum class Meets { fp32, pairs, bf16 };
// activations: as in round_rows
Meets how_meets(const Coded& c, int64_t rows, int64_t activations, bool exact);
void coded_product(const Coded& c, Meets how, int64_t tile0, int64_t tile1);
// x [m, k] in the form of the n-bit products, in scratch of coded_bytes.
int64_t coded_bytes(const Linear& a);
void read_coded(Coded& c, const void* x, int64_t activations, Meets how, char* scratch);

namespace {

constexpr int64_t kManyRows = 256;    // from here on AMX takes x as it is for int4 in less time
constexpr int64_t kPanelRows = 480;   // rows of x, of many, that go through the panels at a time
constexpr int64_t kBytesPerThread = 32768;  // less than this is not worth waking a thread for

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_tiles(const Tensor& tiles, int64_t bytes) {
  check_cpu(tiles, "tiles");
  TORCH_CHECK_VALUE(tiles.scalar_type() == at::kByte && tiles.is_contiguous() &&
                        tiles.numel() == bytes,
                    "tiles must be ", bytes, " contiguous bytes, as the repack operator makes them");
}

int64_t int8_tile_bytes(int64_t k) { return div_up(k, 4) * 64; }

int64_t int4_tile_bytes(int64_t k, int64_t group) {
  TORCH_CHECK_VALUE(group >= 8 && group % 8 == 0, "group size ", group, " is not a multiple of 8");
  return div_up(k, 8) * 64 + div_up(k, group) * 64;
}

// The sums of x over groups.
inline void sum_groups(Linear& a, float* sums) {
  for (int64_t m = 0; m < a.m; m++)
    for (int64_t g = 0; g < a.groups; g++) {
      float total = 0;
      for (int64_t k = g * a.group; k < std::min((g + 1) * a.group, a.kpad); k++)
        total += a.x[m * a.kpad + k];
      sums[g * a.m + m] = total;
    }
  a.group_sum = sums;
}

// x [m, k] in the form of the exact products: fp32 [m, kpad] times a factor, and its sums over groups
// [groups, m].
inline void read_wide(Linear& a, const void* x, bool paired, float* wide, float* sums,
                      float factor = 1) {
  kernels().widen_rows(x, a.type, a.m, a.k, a.kpad, paired, wide);
  a.x = wide;
  for (int64_t i = 0; factor != 1 && i < a.m * a.kpad; i++) wide[i] *= factor;
  sum_groups(a, sums);
}

// Bytes of a tile of 4-bit codes that multiply bytes; see int4dq.cpp.
int64_t int4dq_tile_bytes(int64_t k, int64_t group) {
  TORCH_CHECK_VALUE(group >= 32 && group % 32 == 0, "group size ", group, " is not a multiple of 32");
  return div_up(k, 32) * 256 + div_up(k, group) * 64;
}

// Whether few rows of x of that type meet int8 weights in 16 bits.
inline bool in_pairs(Type type, bool exact) {
  return !exact && type != Type::fp32 && kernels().int8_pairs;
}

constexpr int64_t kMostExact = 65536;  // columns whose products of int8 numbers 32 bits can sum

// The part of a call that all formats share. Holds x and the bias while the kernels read them.
struct Call {
  Tensor x, bias, scales, y;
  Linear a{};

  Call(const Tensor& input, OptTensor bias_, OptTensor scales_, int64_t n, int64_t k) {
    check_cpu(input, "x");
    TORCH_CHECK_VALUE(n >= 0 && k >= 0 && input.dim() >= 1 && input.size(-1) == k, "x ",
                      input.sizes(), " does not fit a weight of ", n, " x ", k);
    x = input.contiguous();
    a.type = type_of(x);
    a.n = n;
    a.k = a.kpad = k;
    auto shape = x.sizes().vec();
    a.m = 1;
    for (size_t i = 0; i + 1 < shape.size(); i++) a.m *= shape[i];
    shape.back() = n;
    y = at::empty(shape, x.options());
    a.y = y.mutable_data_ptr();
    if (bias_) {
      check_cpu(*bias_, "bias");
      TORCH_CHECK_VALUE(bias_->dim() == 1 && bias_->size(0) == n, "bias must be [", n, "]");
      bias = bias_->to(x.scalar_type()).contiguous();
      a.bias = bias.const_data_ptr();
    }
    if (scales_) {
      check_cpu(*scales_, "scales");
      TORCH_CHECK_VALUE(scales_->numel() == n, "scales must have ", n, " entries");
      scales = scales_->contiguous();
      a.scales = scales.const_data_ptr();
      a.scale_type = type_of(scales);
    }
  }

  bool empty() const { return a.m == 0 || a.n == 0; }
  int64_t tiles() const { return div_up(a.n, 16); }

  // f(first, last) over tiles, in pairs, on as many threads as the weight is worth.
  template <class F>
  void over_tiles(int64_t bytes_per_tile, const F& f) const {
    int64_t work = std::max<int64_t>(bytes_per_tile * 2 * std::max<int64_t>(1, a.m / 4), 1);
    at::parallel_for(0, div_up(tiles(), 2), div_up(kBytesPerThread, work), [&](int64_t i, int64_t j) {
      f(i * 2, std::min(j * 2, tiles()));
    });
  }

  bool has_bf16_panels() const { return kernels().bf16_panels && a.type == Type::bf16; }

  // Many rows: products with panels of W. In fp32 kPanelRows rows of x at a time, or, of x that was
  // rounded, of `rounded` [m, kpad] with scales xs [m].
  void through_panels(Format format, Coded c, const float* rounded = nullptr) {
    if (format != Format::rows && !rounded && has_bf16_panels())
      return through_bf16_panels(format, c, x.view({a.m, a.k}));
    Linear& part = c.a;
    const int64_t rows = std::min(a.m, kPanelRows), count = div_up(a.n, kPanelWidth);
    const int64_t per_thread = kPanelWidth * (kPanelDepth + rows), size = x.element_size();
    const int64_t threads = at::get_num_threads(), wide_bytes = rounded ? 0 : rows * part.kpad * 4;
    Scratch scratch(Scratch::round_up(wide_bytes) + threads * per_thread * 4);
    float* wide = scratch.take<float>(wide_bytes / 4);
    float* own = scratch.take<float>(threads * per_thread);
    for (int64_t m = 0; m < a.m; m += rows) {
      part.m = std::min(rows, a.m - m);
      part.y = static_cast<char*>(y.mutable_data_ptr()) + m * a.n * size;
      part.x = rounded ? rounded + m * part.kpad : wide;
      if (rounded && m) part.xs += rows;
      const char* from = static_cast<const char*>(x.const_data_ptr()) + m * a.k * size;
      if (!rounded)
        at::parallel_for(0, part.m, 16, [&](int64_t i, int64_t j) {
          kernels().widen_rows(from + i * a.k * size, a.type, j - i, a.k, part.kpad, false,
                               wide + i * part.kpad);
        });
      at::parallel_for(0, count, 1, [&](int64_t i, int64_t j) {
        kernels().panels(c, format, i, j, own + at::get_thread_num() * per_thread);
      });
    }
  }

  // On AMX, for x or what it was rounded to, bf16 [m, columns].
  void through_bf16_panels(Format format, Coded c, Tensor rows) {
    const int64_t more_rows = -a.m & 15, more_columns = div_up(a.k, 32) * 32 - rows.size(1);
    if (more_rows || more_columns) rows = at::constant_pad_nd(rows, {0, more_columns, 0, more_rows});
    c.a.x = static_cast<const float*>(rows.const_data_ptr());
    at::parallel_for(0, div_up(a.n, kPanelWidth), 1, [&](int64_t i, int64_t j) {
      kernels().bf16_panels(c, format, i, j);
    });
  }
};

}  // namespace
