// The product with an n-bit weight as an operator.
#include <torch/library.h>

#include "call.h"

namespace {

const void* data(OptTensor t, at::ScalarType type, int64_t count, const char* name) {
  if (!t) return nullptr;
  check_cpu(*t, name);
  TORCH_CHECK_VALUE(t->scalar_type() == type && t->is_contiguous() && t->numel() == count, name,
                    " must be ", count, " contiguous ", type, ", as the module's repack makes them");
  return t->const_data_ptr();
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
  a.kpad = div_up(a.k, 32) * 32;
  a.group = group >= a.k ? std::max<int64_t>(a.kpad, 32) : group;
  a.groups = div_up(a.kpad, a.group);
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
  c.integers = true;
  for (int i = 0; i < 1 << bits; i++) c.integers &= values[i] == values[0] + float(i);
  TORCH_CHECK_VALUE(c.integers || exponent_bits || bits == 4, "a free table has 16 values");
  return c;
}

void read_coded(Linear& a, const void* x, bool sums, int64_t activations, float* xw, float* xs,
                float* group_sum) {
  kernels().widen_rows(x, a.type, a.m, a.k, a.kpad, false, xw);
  if (activations) kernels().round_rows(xw, a.m, a.k, a.kpad, int(activations), xs);
  for (int64_t i = 0; sums && i < a.m; i++)
    for (int64_t g = 0; g < a.groups; g++) {
      float total = 0;
      const float* row = xw + i * a.kpad;
      for (int64_t j = g * a.group; j < std::min((g + 1) * a.group, a.kpad); j++) total += row[j];
      group_sum[i * a.groups + g] = total;
    }
  a.x = xw;
  a.group_sum = group_sum;
  a.xs = activations ? xs : nullptr;
}

namespace {

// Few rows of x: stream the codes, each thread its tiles.
void stream(Call& call, Coded& c) {
  const int64_t bytes = (c.positions ? 3 : c.bits) * c.a.kpad * 2;
  call.over_tiles(bytes, [&](int64_t i, int64_t j) { kernels().coded_tiles(c, i, j); });
}

// Many rows: W^T in fp32 panels, then fp32 products.
void through_wide_panels(Call& call, const Coded& c, const Tensor& rows) {
  const Linear& a = c.a;
  Tensor panel = at::empty({a.kpad, std::min(div_up(a.n, 16) * 16, kPanelRows)}, rows.options());
  Tensor out = call.y.view({a.m, a.n}), scales;
  if (a.xs) scales = at::from_blob(const_cast<float*>(a.xs), {a.m, 1}, rows.options());
  float* to = panel.mutable_data_ptr<float>();
  const int64_t width = panel.size(1);
  for (int64_t n = 0; n < a.n; n += kPanelRows) {
    int64_t count = std::min(kPanelRows, a.n - n), first = n / 16;
    at::parallel_for(0, div_up(count, 16), 4, [&](int64_t i, int64_t j) {
      kernels().coded_widen(c, first + i, first + j, width, to + i * 16);
    });
    Tensor part = at::mm(rows, panel.narrow(1, 0, count));
    if (a.xs) part.mul_(scales);
    if (call.bias.defined()) part.add_(call.bias.narrow(0, n, count));
    out.narrow(1, n, count).copy_(part);
  }
}

Tensor coded_linear(const Tensor& x, const Tensor& tiles, const Tensor& scales, OptTensor zeros,
                    OptTensor positions, const Tensor& table, OptTensor bias, int64_t n, int64_t k,
                    int64_t bits, int64_t group, int64_t exponent_bits, int64_t activations) {
  TORCH_CHECK_VALUE(activations >= 0 && activations <= 3, "no such activations");
  Call call(x, bias, std::nullopt, n, k);
  Coded c = describe_coded(call.a, tiles, scales, zeros, positions, table, bits, group,
                           exponent_bits);
  if (call.empty()) return call.y;
  Linear& a = call.a = c.a;
  const bool few = a.m <= kFewRows;
  Tensor wide = at::empty({a.m, a.kpad + (activations ? 1 : 0) + (zeros ? a.groups : 0)},
                          x.options().dtype(at::kFloat));
  float* xw = wide.mutable_data_ptr<float>();
  float *xs = xw + a.m * a.kpad, *sums = xs + (activations ? a.m : 0);
  const char* from = static_cast<const char*>(call.x.const_data_ptr());
  if (few) {
    read_coded(a, from, bool(zeros), activations, xw, xs, sums);
    c.a = a;
    stream(call, c);
    return call.y;
  }
  const bool apart = activations != 3;  // whether rows are rounded without knowing the others
  at::parallel_for(0, a.m, 16, [&](int64_t i, int64_t j) {
    Linear part = a;
    part.m = j - i;
    read_coded(part, from + i * k * x.element_size(), false, apart ? activations : 0,
               xw + i * a.kpad, xs + i, nullptr);
  });
  if (!apart) kernels().round_rows(xw, a.m, k, a.kpad, int(activations), xs);
  a.x = xw;
  a.xs = activations ? xs : nullptr;
  c.a = a;
  through_wide_panels(call, c, at::from_blob(xw, {a.m, a.kpad}, wide.options()));
  return call.y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flatllama, m) {
  m.def("coded_linear(Tensor x, Tensor tiles, Tensor scales, Tensor? zeros, "
        "Tensor? positions, Tensor table, Tensor? bias, int N, int K, int bits, int groupsize, "
        "int exponent_bits, int activations) -> Tensor");
}

TORCH_LIBRARY_IMPL(flatllama, CPU, m) { m.impl("coded_linear", coded_linear); }
