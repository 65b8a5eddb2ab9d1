// The products as operators: checks, the activations' form, and the split over threads.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "call.h"

namespace {

// Whether ATen's product for many rows beats ours: fp32 where MKL does its best, bf16 and fp16 only
// with instructions of their own.
bool fast_in_aten(at::ScalarType type) {
#if defined(__x86_64__)
  if (type == at::kFloat) return __builtin_cpu_is("intel");
  return kernels().lanes == 16 && (type == at::kBFloat16 ? __builtin_cpu_supports("avx512bf16")
                                                         : __builtin_cpu_supports("avx512fp16"));
#else
  return true;
#endif
}

Tensor float_linear(const Tensor& x, const Tensor& weight, OptTensor bias) {
  check_cpu(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be [N, K]");
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), "x is ", x.scalar_type(),
                   " but the weight is ", weight.scalar_type());
  int64_t n = weight.size(0), k = weight.size(1);
  const bool many = k > 0 && x.numel() > kFewRows * k;
  if (many && fast_in_aten(x.scalar_type())) {
    auto shape = x.sizes().vec();
    shape.back() = n;  // in two dimensions: in three ATen may copy the weight for every sequence
    return at::linear(x.reshape({-1, k}), weight, bias).view(shape);
  }
  Call call(x, bias, std::nullopt, n, k);
  if (call.empty()) return call.y;
  Linear& a = call.a;
  Tensor rows = weight.contiguous();
  a.w = rows.const_data_ptr();
  if (many) {
    call.through_panels(Format::rows, Coded{a});
    return call.y;
  }
  a.kpad = div_up(k, 32) * 32;
  Scratch scratch(Scratch::round_up(a.m * a.kpad * 4));
  float* wide = scratch.take<float>(a.m * a.kpad);
  kernels().widen_rows(call.x.const_data_ptr(), a.type, a.m, k, a.kpad, a.type == Type::bf16, wide);
  a.x = wide;
  int64_t bytes = std::max<int64_t>(4 * k * rows.element_size(), 1);
  at::parallel_for(0, div_up(n, 4), div_up(kBytesPerThread, bytes), [&](int64_t i, int64_t j) {
    kernels().float_rows(a, i * 4, std::min(j * 4, n));
  });
  return call.y;
}

// Quantize x once, then let all threads use it.
template <class F>
void with_quantized(Call& call, int32_t zero_code, Rounding rounding, bool group_sums, const F& f) {
  Linear& a = call.a;
  a.blocks = std::max<int64_t>(div_up(a.kpad, a.block), 1);
  const int64_t codes = rounding == Rounding::pairs ? 2 * a.kpad : a.kpad;
  int64_t per_row = Scratch::round_up(codes) + Scratch::round_up(a.blocks * 8) + a.groups * 4 + 64;
  const int64_t rows = a.m > 16 ? div_up(a.m, 16) * 16 : a.m;
  Scratch scratch(rows * per_row + 256);
  Quantized q{scratch.take<int8_t>(rows * codes), scratch.take<float>(a.m * a.blocks),
              scratch.take<int32_t>(a.m * a.blocks), nullptr, zero_code, rounding};
  if (group_sums) q.group_sum = scratch.take<float>(a.m * a.groups);
  const void* x = call.x.const_data_ptr();
  at::parallel_for(0, a.m, div_up(16384, std::max<int64_t>(a.k, 1)), [&](int64_t i, int64_t j) {
    kernels().quantize_rows(x, a, q, i, j);
  });
  a.xq = q.xq;
  a.xs = q.xs;
  a.offset = q.offset;
  a.group_sum = q.group_sum;
  f();
}

Tensor int8_repack(const Tensor& codes) {
  check_cpu(codes, "codes");
  TORCH_CHECK_VALUE(codes.dim() == 2 && codes.scalar_type() == at::kChar, "codes must be int8 [N, K]");
  Tensor from = codes.contiguous();
  int64_t n = from.size(0), k = from.size(1), bytes = int8_tile_bytes(k);
  Tensor tiles = at::empty({div_up(n, 16), bytes}, from.options().dtype(at::kByte));
  const int8_t* p = from.const_data_ptr<int8_t>();
  uint8_t* out = tiles.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, tiles.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      memset(out + t * bytes, 128, bytes);
      for (int64_t r = 0; r < std::min<int64_t>(16, n - t * 16); r++)
        for (int64_t c = 0; c < k; c++)
          out[t * bytes + c / 4 * 64 + r * 4 + c % 4] = uint8_t(p[(t * 16 + r) * k + c]) ^ 128;
    }
  });
  return tiles;
}

// fp32 rows of x, times a factor, for the exact paths.
template <class F>
void with_wide(Call& call, float factor, const F& f) {
  Linear& a = call.a;
  Scratch scratch(Scratch::round_up(a.m * a.kpad * 4) + Scratch::round_up(a.m * a.groups * 4));
  float* wide = scratch.take<float>(a.m * a.kpad);
  read_wide(a, call.x.const_data_ptr(), false, wide, scratch.take<float>(a.m * a.groups), factor);
  f();
}

Tensor int8_linear(const Tensor& x, const Tensor& tiles, const Tensor& scales, OptTensor bias,
                   int64_t n, int64_t k, bool exact) {
  Call call(x, bias, scales, n, k);
  check_tiles(tiles, div_up(n, 16) * int8_tile_bytes(k));
  if (call.empty()) return call.y;
  Linear& a = call.a;
  a.w = tiles.const_data_ptr();
  a.kpad = div_up(k, 4) * 4;
  if (k > 0 && in_pairs(a.type, exact) && (a.m <= kFewRows || !call.has_bf16_panels())) {
    a.block = kPairBlock;
    with_quantized(call, 128, Rounding::pairs, false, [&] {
      call.over_tiles(int8_tile_bytes(k),
                      [&](int64_t i, int64_t j) { kernels().int8_pairs(a, i, j); });
    });
  } else if (a.m <= kFewRows || k == 0) {
    with_wide(call, kByteOnTop, [&] {
      call.over_tiles(int8_tile_bytes(k),
                      [&](int64_t i, int64_t j) { kernels().int8_exact(a, i, j); });
    });
  } else {
    call.through_panels(Format::int8, Coded{a});
  }
  return call.y;
}

Tensor int8dq_linear(const Tensor& x, const Tensor& tiles, const Tensor& scales, OptTensor bias,
                     int64_t n, int64_t k) {
  TORCH_CHECK_VALUE(k <= kMostExact, "int8dq sums in 32 bits: K is at most 65536, not ", k);
  Call call(x, bias, scales, n, k);
  check_tiles(tiles, div_up(n, 16) * int8_tile_bytes(k));
  if (call.empty()) return call.y;
  Linear& a = call.a;
  a.w = tiles.const_data_ptr();
  a.kpad = div_up(k, 4) * 4;
  a.block = std::max<int64_t>(a.kpad, 4);
  with_quantized(call, 128, Rounding::token, false, [&] {
    call.over_tiles(int8_tile_bytes(k),
                    [&](int64_t i, int64_t j) { kernels().int8_tiles(a, i, j); });
  });
  return call.y;
}

Tensor int4_repack(const Tensor& codes, const Tensor& scales, const Tensor& zeros, int64_t k,
                   int64_t group) {
  for (const Tensor& t : {codes, scales, zeros}) check_cpu(t, "the weight");
  int64_t n = codes.size(0), bytes = int4_tile_bytes(k, group), groups = div_up(k, group);
  TORCH_CHECK_VALUE(codes.dim() == 2 && codes.scalar_type() == at::kByte &&
                        codes.size(1) == div_up(k, 2), "codes must be uint8 [N, ceil(K / 2)]");
  for (const Tensor& t : {scales, zeros})
    TORCH_CHECK_VALUE(t.scalar_type() == at::kBFloat16 && t.sizes() == at::IntArrayRef({n, groups}),
                      "scales and zeros must be bf16 [", n, ", ", groups, "]");
  Tensor from = codes.contiguous(), s = scales.contiguous(), z = zeros.contiguous();
  Tensor tiles = at::empty({div_up(n, 16), bytes}, codes.options());
  const uint8_t* p = from.const_data_ptr<uint8_t>();
  const auto* sp = static_cast<const uint16_t*>(s.const_data_ptr());
  const auto* zp = static_cast<const uint16_t*>(z.const_data_ptr());
  uint8_t* out = tiles.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, tiles.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      uint8_t* tile = out + t * bytes;
      memset(tile, 0, bytes);
      for (int64_t r = 0; r < std::min<int64_t>(16, n - t * 16); r++) {
        int64_t row = t * 16 + r;
        for (int64_t c = 0; c < k; c++) {
          int code = p[row * div_up(k, 2) + c / 2] >> (c % 2 * 4) & 15;
          tile[(c / 8 + c / group) * 64 + r * 4 + c % 4] |= code << (c % 8 / 4 * 4);
        }
        for (int64_t g = 0; g < groups; g++) {
          int64_t columns = std::min((g + 1) * group, div_up(k, 8) * 8);
          auto* params = reinterpret_cast<uint16_t*>(tile + (columns / 8 + g) * 64);
          params[2 * r] = sp[row * groups + g];
          params[2 * r + 1] = zp[row * groups + g];
        }
      }
    }
  });
  return tiles;
}

Tensor int4_linear(const Tensor& x, const Tensor& tiles, OptTensor bias, int64_t n, int64_t k,
                   int64_t group, bool exact) {
  Call call(x, bias, std::nullopt, n, k);
  int64_t bytes = int4_tile_bytes(k, group);
  check_tiles(tiles, div_up(n, 16) * bytes);
  if (call.empty()) return call.y;
  Linear& a = call.a;
  a.w = tiles.const_data_ptr();
  a.kpad = div_up(k, 8) * 8;
  a.group = group;
  a.groups = div_up(k, group);
  for (a.block = std::min<int64_t>(group, 64); group % a.block; a.block -= 8) {}
  if (!exact && !(a.m >= kManyRows && k > 0 && call.has_bf16_panels())) {
    with_quantized(call, 8, Rounding::blocks, true, [&] {
      call.over_tiles(bytes, [&](int64_t i, int64_t j) { kernels().int4_tiles(a, i, j); });
    });
  } else if (a.m <= kFewRows || k == 0) {
    with_wide(call, 1, [&] {
      call.over_tiles(bytes, [&](int64_t i, int64_t j) { kernels().int4_exact(a, i, j); });
    });
  } else {
    call.through_panels(Format::int4, Coded{a});
  }
  return call.y;
}

Tensor int4dq_repack(const Tensor& codes, const Tensor& scales, int64_t k, int64_t group) {
  for (const Tensor& t : {codes, scales}) check_cpu(t, "the weight");
  int64_t n = codes.size(0), bytes = int4dq_tile_bytes(k, group), groups = div_up(k, group);
  const bool nested = scales.scalar_type() == at::kHalf;
  TORCH_CHECK_VALUE(codes.dim() == 2 && codes.scalar_type() == at::kByte &&
                        codes.size(1) == div_up(k, 2), "codes must be uint8 [N, ceil(K / 2)]");
  TORCH_CHECK_VALUE((nested || scales.scalar_type() == at::kBFloat16) &&
                        scales.sizes() == at::IntArrayRef({n, groups}),
                    "scales must be bf16, or fp16 if nested, [", n, ", ", groups, "]");
  TORCH_CHECK_VALUE(group * (nested ? 127 : 8) < 32768, "group size ", group, " is too large");
  Tensor from = codes.contiguous(), s = scales.contiguous(), values = s.to(at::kFloat);
  Tensor tiles = at::zeros({div_up(n, 16), bytes}, codes.options());
  const uint8_t* p = from.const_data_ptr<uint8_t>();
  const auto* bits = static_cast<const uint16_t*>(s.const_data_ptr());
  const float* factor = values.const_data_ptr<float>();
  uint8_t* out = tiles.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, tiles.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      uint8_t* to = out + t * bytes;
      for (int64_t g = 0; g < groups; g++) {
        auto* params = reinterpret_cast<uint16_t*>(to);
        auto* sums = reinterpret_cast<int16_t*>(to + 32);
        to += 64;
        for (int64_t k0 = g * group; k0 < std::min((g + 1) * group, k); k0 += 32, to += 256)
          for (int64_t r = 0; r < 16; r++) {
            const int64_t row = std::min(t * 16 + r, n - 1), at = row * groups + g;
            const uint8_t* line = p + row * div_up(k, 2) + k0 / 2;
            params[r] = bits[at];
            for (int64_t c = 0; c < 32; c++) {
              // 8 is 0: what lies past the last column
              const int code = k0 + c < k ? line[c / 2] >> (c % 2 * 4) & 15 : 8;
              to[r * 16 + c % 16] |= code << (c / 16 * 4);
              sums[r] += nested ? int(nearbyint((code - 8) * factor[at])) : code - 8;
            }
          }
      }
    }
  });
  return tiles;
}

Tensor int4dq_linear(const Tensor& x, const Tensor& tiles, OptTensor scales, OptTensor bias,
                     int64_t n, int64_t k, int64_t group) {
  TORCH_CHECK_VALUE(k <= kMostExact, "int4dq sums in 32 bits: K is at most 65536, not ", k);
  Call call(x, bias, scales, n, k);
  const int64_t bytes = int4dq_tile_bytes(k, group);
  check_tiles(tiles, div_up(n, 16) * bytes);
  if (call.empty()) return call.y;
  Linear& a = call.a;
  a.w = tiles.const_data_ptr();
  a.kpad = div_up(k, 32) * 32;
  a.block = std::max<int64_t>(a.kpad, 32);
  a.group = group;
  a.groups = div_up(k, group);
  with_quantized(call, 8, scales ? Rounding::bytes : Rounding::span, false, [&] {
    call.over_tiles(bytes, [&](int64_t i, int64_t j) { kernels().int4dq_tiles(a, i, j); });
  });
  return call.y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flatllama, m) {
  m.def("float_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("int8_repack(Tensor codes) -> Tensor");
  m.def("int8_linear(Tensor x, Tensor tiles, Tensor scales, Tensor? bias, int N, int K, "
        "bool exact=False) -> Tensor");
  m.def("int8dq_linear(Tensor x, Tensor tiles, Tensor scales, Tensor? bias, int N, int K) -> Tensor");
  m.def("int4_repack(Tensor codes, Tensor scales, Tensor zeros, int K, int groupsize) -> Tensor");
  m.def("int4_linear(Tensor x, Tensor tiles, Tensor? bias, int N, int K, int groupsize, bool exact)"
        " -> Tensor");
  m.def("int4dq_repack(Tensor codes, Tensor scales, int K, int groupsize) -> Tensor");
  m.def("int4dq_linear(Tensor x, Tensor tiles, Tensor? scales, Tensor? bias, int N, int K, "
        "int groupsize) -> Tensor");
}

TORCH_LIBRARY_IMPL(flatllama, CPU, m) {
  m.impl("float_linear", float_linear);
  m.impl("int8_repack", int8_repack);
  m.impl("int8_linear", int8_linear);
  m.impl("int8dq_linear", int8dq_linear);
  m.impl("int4_repack", int4_repack);
  m.impl("int4_linear", int4_linear);
  m.impl("int4dq_repack", int4dq_repack);
  m.impl("int4dq_linear", int4dq_linear);
}
