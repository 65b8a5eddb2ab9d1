// A linear layer of any format inside a larger operator.
#pragma once
#include <vector>

#include "call.h"

namespace {

// How a layer comes from Python (`native_form` of its module): its tensors, and numbers that begin
// with the kind, N, K. The first three tensors are the weight, the bias and the input's scale.
using Tensors = c10::ArrayRef<std::optional<Tensor>>;
enum class Kind : int64_t { rows, int8, int8dq, int4, coded, int4dq };

struct Product {
  Kind kind{};
  Coded c{};               // of the formats but coded only c.a is used
  int64_t activations = 0; // coded: how x is rounded
  bool exact = false;      // x is taken as it is, where asked for
  const void* input_scale = nullptr;
  std::vector<Tensor> held;

  Product() = default;
  Product(const Tensors& tensors, at::IntArrayRef numbers, Type type) {
    TORCH_CHECK_VALUE(tensors.size() >= 3 && numbers.size() >= 3, "not a layer's native form");
    auto get = [&](size_t i) { return i < tensors.size() ? tensors[i] : std::nullopt; };
    auto has = [&](size_t count, std::initializer_list<size_t> needed) {
      bool all = numbers.size() >= count;
      for (size_t i : needed) all = all && get(i);
      TORCH_CHECK_VALUE(all, "not the native form of a layer of kind ", numbers[0]);
    };
    Linear& a = c.a;
    kind = Kind(numbers[0]);
    has(3, {0});
    a.n = numbers[1];
    a.k = numbers[2];
    a.type = type;
    Tensor weight = hold(*get(0));
    bytes_ = weight.nbytes();
    a.w = weight.const_data_ptr();
    if (get(1)) a.bias = vector(*get(1), a.n, type, "bias");
    if (get(2)) input_scale = vector(*get(2), a.k, Type::bf16, "input_scale");
    a.block = std::max<int64_t>(a.k, 4);
    a.groups = 0;
    switch (kind) {
      case Kind::rows:
        TORCH_CHECK_VALUE(type_of(weight) == type && weight.numel() == a.n * a.k, "weight: ",
                          weight.sizes());
        a.kpad = div_up(a.k, 32) * 32;
        break;
      case Kind::int8:
      case Kind::int8dq: {
        has(3, {3});
        TORCH_CHECK_VALUE(kind == Kind::int8 || a.k <= kMostExact, "int8dq: K is ", a.k);
        Tensor scales = hold(*get(3));
        a.scale_type = type_of(scales);
        a.scales = vector(scales, a.n, a.scale_type, "scales");
        exact = kind == Kind::int8 && numbers.size() > 3 && numbers[3];
        a.kpad = div_up(a.k, 4) * 4;
        a.block = kind == Kind::int8 ? kPairBlock : std::max<int64_t>(a.kpad, 4);
        check_tiles(weight, div_up(a.n, 16) * int8_tile_bytes(a.k));
        break;
      }
      case Kind::int4:
        has(5, {});
        a.group = numbers[3];
        exact = numbers[4];
        check_tiles(weight, div_up(a.n, 16) * int4_tile_bytes(a.k, a.group));
        a.kpad = div_up(a.k, 8) * 8;
        a.groups = div_up(a.k, a.group);
        for (a.block = std::min<int64_t>(a.group, 64); a.group % a.block; a.block -= 8) {}
        break;
      case Kind::int4dq:
        has(4, {});
        a.group = numbers[3];
        check_tiles(weight, div_up(a.n, 16) * int4dq_tile_bytes(a.k, a.group));
        a.kpad = div_up(a.k, 32) * 32;
        a.groups = div_up(a.k, a.group);
        a.block = std::max<int64_t>(a.kpad, 32);
        if (get(3)) {
          a.scale_type = Type::fp32;
          a.scales = vector(*get(3), a.n, Type::fp32, "scales");
        }
        break;
      case Kind::coded:
        has(8, {3, 6});
        for (size_t i = 3; i < tensors.size(); i++)
          if (get(i)) hold(*get(i));
        c = describe_coded(a, weight, *get(3), get(4), get(5), *get(6), numbers[3], numbers[4],
                           numbers[5]);
        exact = numbers[7];
        activations = numbers[6];
        TORCH_CHECK_VALUE(activations >= 0 && activations <= 3, "no such activations");
        break;
      default: TORCH_CHECK_VALUE(false, "no such kind of layer: ", numbers[0]);
    }
    c.a.blocks = div_up(c.a.kpad, c.a.block);
  }

  // Whether weights of int8 or int4 meet x as it is, in fp32.
  bool takes_fp32() const {
    return kind == Kind::int8 ? !in_pairs(c.a.type, exact) : kind == Kind::int4 && exact;
  }

  // How many of m rows one read() and run() take.
  int64_t at_once(int64_t m) const {
    if (kind == Kind::rows || kind == Kind::int8dq || kind == Kind::int4dq || in_panels(m)) return m;
    if (kind == Kind::int4 && kernels().bf16_panels) return m;  // AMX takes any number
    return std::min(m, kFewRows);
  }

  // Whether so many rows of x meet panels of the weight in bf16, as they are: where few rows do so in
  // fp32; where they meet codes in planes, whose values it pays to put together but once.
  bool in_panels(int64_t m) const {
    if (m <= kFewRows || activations || c.a.type != Type::bf16 || !kernels().bf16_panels) return false;
    if (kind != Kind::coded) return takes_fp32();
    const Meets how = how_meets(c, m, activations, exact);
    return how == Meets::fp32 || (how == Meets::pairs && (!c.integers || m >= 2 * kFewRows));
  }

  // Whether a row of the result depends on no other row of x.
  bool rows_apart() const { return kind != Kind::coded || activations != 3; }

  // Output columns are handed out in units of so many.
  int64_t unit() const { return kind == Kind::rows ? 4 : 32; }
  int64_t units() const { return div_up(c.a.n, unit()); }
  int64_t unit_bytes() const { return bytes_ / units(); }

  // Scratch that read() needs for up to m rows.
  int64_t bytes(int64_t m) const {
    Linear a = c.a;
    a.m = m;
    return Scratch::round_up(m * a.k * 4) + coded_bytes(a) + (in_panels(m) ? padded_bytes(m) : 0);
  }

  // The product of x [m, k] into y [m, n], with x in the form that run() takes; each thread makes
  // its own, which saves a wait.
  Coded read(const void* x, int64_t m, void* y, char* scratch) const {
    Coded own = c;
    Linear& a = own.a;
    a.m = m;
    a.y = y;
    auto take = [&](int64_t count) {
      char* p = scratch;
      scratch += Scratch::round_up(count * 4);
      return reinterpret_cast<float*>(p);
    };
    if (input_scale) {
      const int64_t size = a.type == Type::fp32 ? 4 : 2;
      char* scaled = reinterpret_cast<char*>(take(a.m * a.k));
      for (int64_t r = 0; r < a.m; r++)
        kernels().multiply_scale(static_cast<const char*>(x) + r * a.k * size, input_scale, a.type,
                                 a.k, scaled + r * a.k * size);
      x = scaled;
    }
    if (in_panels(m)) {
      a.x = take(padded_bytes(m) / 4);
      const int64_t bytes = a.k * 2, padded = div_up(a.k, 32) * 64;  // of a row
      char* to = reinterpret_cast<char*>(const_cast<float*>(a.x));
      for (int64_t r = 0; r < m; r++, to += padded) {
        memcpy(to, static_cast<const char*>(x) + r * bytes, bytes);
        memset(to + bytes, 0, padded - bytes);
      }
      return own;
    }
    if (kind == Kind::coded) {
      read_coded(own, x, activations, how_meets(c, m, activations, exact), scratch);
      return own;
    }
    float* wide = take(a.m * a.kpad);
    float* scales = take(a.m * a.blocks);
    float* sums = take(a.m * a.groups);
    if (kind == Kind::rows || takes_fp32()) {
      read_wide(a, x, kind == Kind::rows && a.type == Type::bf16, wide, sums,
                kind == Kind::int8 ? kByteOnTop : 1);
    } else {
      auto* offset = reinterpret_cast<int32_t*>(take(a.m * a.blocks));
      const Rounding rounding = kind == Kind::int4     ? Rounding::blocks
                                : kind == Kind::int8   ? Rounding::pairs
                                : kind == Kind::int8dq ? Rounding::token
                                : a.scales             ? Rounding::bytes
                                                       : Rounding::span;
      Quantized q{reinterpret_cast<int8_t*>(wide), scales, offset, a.groups ? sums : nullptr,
                  kind == Kind::int4 ? 8 : 128, rounding};
      kernels().quantize_rows(x, a, q, 0, a.m);
      a.xq = q.xq;
      a.xs = q.xs;
      a.offset = q.offset;
      a.group_sum = q.group_sum;
    }
    return own;
  }

  // Units [first, last) of the result.
  void run(const Coded& own, int64_t first, int64_t last) const {
    const Linear& a = own.a;
    const int64_t end = std::min(last * 2, div_up(a.n, 16));
    const Kernels& k = kernels();
    if (first >= last) return;
    if (in_panels(a.m)) {
      const Format format = kind == Kind::int8   ? Format::int8
                            : kind == Kind::int4 ? Format::int4
                                                 : Format::coded;
      return k.bf16_panels(own, format, first, last);
    }
    if (kind == Kind::rows) k.float_rows(a, first * 4, std::min(last * 4, a.n));
    else if (kind == Kind::coded)
      coded_product(own, how_meets(c, a.m, activations, exact), first * 2, end);
    else if (kind == Kind::int4dq) k.int4dq_tiles(a, first * 2, end);
    else if (kind == Kind::int4 && takes_fp32()) k.int4_exact(a, first * 2, end);
    else if (kind == Kind::int4) k.int4_tiles(a, first * 2, end);
    else if (kind == Kind::int8dq) k.int8_tiles(a, first * 2, end);
    else if (takes_fp32()) k.int8_exact(a, first * 2, end);
    else k.int8_pairs(a, first * 2, end);
  }

 private:
  int64_t bytes_ = 0;

  // Of x for panels: whole 16 rows, of which only those of x matter, of whole 32 columns in bf16.
  int64_t padded_bytes(int64_t m) const {
    return div_up(m, 16) * 16 * div_up(c.a.k, 32) * 64;
  }

  Tensor hold(const Tensor& t) {
    check_cpu(t, "a layer's tensor");
    held.push_back(t.contiguous().detach());  // the memory stays, whatever becomes of the tensor
    return held.back();
  }
  const void* vector(const Tensor& t, int64_t count, Type type, const char* name) {
    TORCH_CHECK_VALUE(t.numel() == count && type_of(t) == type, name, " must have ", count,
                      " entries of the right dtype, not ", t.sizes());
    return hold(t).const_data_ptr();
  }
};

}  // namespace
