// The product with an n-bit weight as an operator.
#include <torch/library.h>

#include <cmath>

#include "call.h"

namespace {

const void* data(OptTensor t, at::ScalarType type, int64_t count, const char* name) {
  if (!t) return nullptr;
  check_cpu(*t, name);
  TORCH_CHECK_VALUE(t->scalar_type() == type && t->is_contiguous() && t->numel() == count, name,
                    " must be ", count, " contiguous ", type, ", as the module's repack makes them");
  return t->const_data_ptr();
}

// The bytes of values that are looked up: of small floats, multiples of their smallest one, where 16 bits
// have room for all; the numbers of a table to the nearest 2^-15 of its largest.
void set_bytes(Coded& c, const float* values) {
  if (c.integers || c.bits > 6 || c.exponent_bits > 3) return;
  const int count = 1 << c.bits;
  float most = 0;
  for (int i = 0; i < count; i++) most = std::max(most, std::abs(values[i]));
  c.unit = c.exponent_bits ? values[1] : most > 0 ? most / 32767 : 1;
  for (int i = 0; i < 64; i++) {
    const int value = int(std::nearbyint(values[i % count] / c.unit)) + 32768;
    c.low[i] = uint8_t(value);
    c.high[i] = uint8_t(value >> 8);
  }
}

}  // namespace

Coded describe_coded(const Linear& product, const Tensor& tiles, const Tensor& scales,
                     OptTensor zeros, OptTensor positions, const Tensor& table, int64_t bits,
                     int64_t group, int64_t exponent_bits) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8 && exponent_bits >= 0 && exponent_bits <= 5 &&
                        (!exponent_bits || (exponent_bits >= 2 && exponent_bits <= bits - 2)),
                    "no such format: ", bits, " bits, of them ", exponent_bits, " exponent");
  TORCH_CHECK_VALUE(group > 0 && (group % 32 == 0 || group >= product.k), "group size ", group,
                    " is not a multiple of 32");
  Coded c{product};
  Linear& a = c.a;
  const int64_t whole = positions ? 64 : 32;  // columns of a block of codes
  a.kpad = div_up(a.k, whole) * whole;
  a.group = group >= a.k ? std::max<int64_t>(a.kpad, 32) : group;
  a.groups = div_up(a.k, a.group);
  const int64_t rows = div_up(a.n, 16) * 16, blocks = a.kpad / 32;
  c.bits = int(bits);
  c.exponent_bits = int(exponent_bits);
  c.codes = static_cast<const uint32_t*>(
      data(tiles, at::kInt, rows * blocks * (positions ? 2 : bits), "tiles"));
  c.positions = static_cast<const uint32_t*>(data(positions, at::kInt, rows * blocks, "positions"));
  c.scale_type = type_of(scales);
  c.scales = data(scales, scales.scalar_type(), rows * a.groups, "scales");
  c.zeros = static_cast<const uint8_t*>(data(zeros, at::kByte, rows * a.groups, "zeros"));
  const auto* values =
      static_cast<const float*>(data(table, at::kFloat, int64_t(1) << bits, "table"));
  for (int i = 0; i < 32; i++) c.table[i] = values[i % (1 << bits)];
  c.integers = bits < 8 && !positions && !exponent_bits && values[0] == std::nearbyint(values[0]);
  for (int i = 0; i < 1 << bits; i++) c.integers &= values[i] == values[0] + float(i);
  TORCH_CHECK_VALUE(c.integers || exponent_bits || bits == 4, "a free table has 16 values");
  set_bytes(c, values);
  a.block = a.group % kPairBlock && a.groups > 1 ? 32 : kPairBlock;
  a.blocks = div_up(a.kpad, a.block);
  return c;
}

Meets how_meets(const Coded& c, int64_t rows, int64_t activations, bool exact) {
  const Kernels& k = kernels();
  const bool pairs = !activations && !exact && c.a.type != Type::fp32;
  if (c.integers && k.plane_pairs && (pairs || activations == 1)) return Meets::pairs;
  // rounded x is of bf16 numbers: e4m3, or integers up to 255
  const bool bf16 = c.exponent_bits && !c.zeros && c.a.groups == 1 && k.half_tiles &&
                    (activations || c.a.type == Type::bf16);
  const bool looked_up = c.unit && c.bits <= k.lookup_bits && !(bf16 && rows > 2);
  if (pairs && (c.positions ? k.sparse_pairs != nullptr : looked_up)) return Meets::pairs;
  return bf16 ? Meets::bf16 : Meets::fp32;
}

void coded_product(const Coded& c, Meets how, int64_t tile0, int64_t tile1) {
  const Kernels& k = kernels();
  (how == Meets::pairs  ? c.positions ? k.sparse_pairs : k.plane_pairs
   : how == Meets::bf16 ? k.half_tiles
                        : k.coded_tiles)(c, tile0, tile1);
}

int64_t coded_bytes(const Linear& a) {
  return Scratch::round_up(a.m * a.kpad * 4) + Scratch::round_up(a.m * a.kpad * 2) +
         Scratch::round_up(a.m * 4) + 2 * Scratch::round_up(a.m * a.blocks * 4) +
         Scratch::round_up(a.m * a.groups * 4);
}

// Rows of bf16 numbers [m, k], in bf16 or as the upper halves of fp32, to bf16 [m, kpad] with zeros
// after their end; of each four columns the middle two are swapped.
template <class T>
void swap_middles(const T* from, int64_t m, int64_t k, int64_t kpad, uint16_t* to) {
  constexpr int kShift = 8 * sizeof(T) - 16;
  for (int64_t r = 0; r < m; r++, from += k, to += kpad) {
    int64_t i = 0;
    for (; i + 4 <= k; i += 4) {
      to[i] = from[i] >> kShift;
      to[i + 1] = from[i + 2] >> kShift;
      to[i + 2] = from[i + 1] >> kShift;
      to[i + 3] = from[i + 3] >> kShift;
    }
    memset(to + i, 0, (kpad - i) * 2);
    for (; i < k; i++) to[i + (i % 4 == 1) - (i % 4 == 2)] = from[i] >> kShift;
  }
}

void read_coded(Coded& c, const void* x, int64_t activations, Meets how, char* scratch) {
  Linear& a = c.a;
  auto take = [&](int64_t bytes) {
    char* p = scratch;
    scratch += Scratch::round_up(bytes);
    return p;
  };
  float* wide = reinterpret_cast<float*>(take(a.m * a.kpad * 4));
  float* sums = c.zeros ? reinterpret_cast<float*>(take(a.m * a.groups * 4)) : nullptr;
  float* scales = reinterpret_cast<float*>(take(a.m * 4));
  const bool apart = activations != 3;  // whether rows are rounded without knowing the others
  auto over_rows = [&](auto&& work) {
    at::parallel_for(0, a.m, div_up(16384, std::max<int64_t>(a.k, 1)), work);
  };
  auto row_of_x = [&](int64_t i) {
    return static_cast<const char*>(x) + i * a.k * (a.type == Type::fp32 ? 4 : 2);
  };
  a.x = wide;
  if (activations || how == Meets::fp32)
    over_rows([&](int64_t i, int64_t j) {
      float* rows = wide + i * a.kpad;
      kernels().widen_rows(row_of_x(i), a.type, j - i, a.k, a.kpad, false, rows);
      if (activations && apart)
        kernels().round_rows(rows, j - i, a.kpad, int(activations), scales + i);
    });
  if (!apart) kernels().round_rows(wide, a.m, a.kpad, int(activations), scales);
  if (activations) a.xs = scales;
  if (how == Meets::fp32) {
    if (sums) sum_groups(a, sums);
    return;
  }
  char* narrow = take(a.m * a.kpad * 2);
  if (how == Meets::bf16) {
    auto* to = reinterpret_cast<uint16_t*>(narrow);
    over_rows([&](int64_t i, int64_t j) {
      const auto* bits = reinterpret_cast<const uint32_t*>(wide + i * a.kpad);
      const auto* halves = reinterpret_cast<const uint16_t*>(row_of_x(i));
      if (activations) swap_middles(bits, j - i, a.kpad, a.kpad, to + i * a.kpad);
      else swap_middles(halves, j - i, a.k, a.kpad, to + i * a.kpad);
    });
    a.x = reinterpret_cast<const float*>(to);
    return;
  }
  Quantized q{reinterpret_cast<int8_t*>(narrow),
              reinterpret_cast<float*>(take(a.m * a.blocks * 4)),
              reinterpret_cast<int32_t*>(take(a.m * a.blocks * 4)), sums,
              c.integers ? int32_t(-c.table[0]) : 128, Rounding::pairs};
  Linear from = a;
  if (activations) {
    from.type = Type::fp32;
    from.k = a.kpad;
  }
  over_rows([&](int64_t i, int64_t j) {
    kernels().quantize_rows(activations ? wide : x, from, q, i, j);
    for (int8_t* plane : {q.xq, q.xq + a.m * a.kpad})
      for (int64_t at = i * a.kpad; c.positions && at < j * a.kpad; at++) plane[at] ^= int8_t(-128);
  });
  a.xq = q.xq;
  a.xs = q.xs;
  a.offset = q.offset;
  a.group_sum = sums;
}

namespace {

Tensor coded_linear(const Tensor& x, const Tensor& tiles, const Tensor& scales, OptTensor zeros,
                    OptTensor positions, const Tensor& table, OptTensor bias, int64_t n, int64_t k,
                    int64_t bits, int64_t group, int64_t exponent_bits, int64_t activations,
                    bool exact) {
  TORCH_CHECK_VALUE(activations >= 0 && activations <= 3, "no such activations");
  Call call(x, bias, std::nullopt, n, k);
  Coded c = describe_coded(call.a, tiles, scales, zeros, positions, table, bits, group,
                           exponent_bits);
  if (call.empty()) return call.y;
  Linear& a = c.a;
  const char* from = static_cast<const char*>(call.x.const_data_ptr());
  const Meets how = how_meets(c, a.m, activations, exact);
  // Many rows are fastest as bytes of 16 bits with AVX-512 and as bf16, but for AMX, which has panels.
  const bool as_bytes = how == Meets::pairs && (c.integers || positions) && kernels().lanes == 16;
  const bool as_they_are = (as_bytes || how == Meets::bf16) && !call.has_bf16_panels();
  if (a.m <= kFewRows || as_they_are) {  // each thread streams its tiles
    Scratch scratch(coded_bytes(a));
    read_coded(c, from, activations, how, scratch.take<char>(coded_bytes(a)));
    call.over_tiles((positions ? 3 : bits) * a.kpad * 2,
                    [&](int64_t i, int64_t j) { coded_product(c, how, i, j); });
  } else if (!activations) {
    call.through_panels(Format::coded, c);
  } else {
    Tensor memory = at::empty({coded_bytes(a)}, x.options().dtype(at::kByte));
    read_coded(c, from, activations, Meets::fp32, static_cast<char*>(memory.mutable_data_ptr()));
    if (call.has_bf16_panels()) {  // e4m3 and integers up to 255 are bf16 numbers
      auto* rounded = const_cast<float*>(a.x);
      call.through_bf16_panels(
          Format::coded, c, at::from_blob(rounded, {a.m, a.kpad}, at::kFloat).to(at::kBFloat16));
    } else {
      call.through_panels(Format::coded, c, a.x);
    }
  }
  return call.y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flatllama, m) {
  m.def("coded_linear(Tensor x, Tensor tiles, Tensor scales, Tensor? zeros, "
        "Tensor? positions, Tensor table, Tensor? bias, int N, int K, int bits, int groupsize, "
        "int exponent_bits, int activations, bool exact) -> Tensor");
}

TORCH_LIBRARY_IMPL(flatllama, CPU, m) { m.impl("coded_linear", coded_linear); }
