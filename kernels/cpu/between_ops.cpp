// What lies between the products, for many rows, as operators: each reads and writes its rows once.
// And what follows the last one: the greedy choice, and the largest logits to sample from.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "choose.h"

using at::Tensor;

namespace {

constexpr int64_t kGrain = 8;  // rows that are worth waking a thread for

// x [..., C] / rms(x) * weight [C].
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_cpu(x, "x");
  check_cpu(weight, "weight");
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.sizes() == at::IntArrayRef({x.size(-1)}) &&
                        weight.scalar_type() == x.scalar_type(),
                    "weight must be one number for each column of x ", x.sizes(), ", in its dtype");
  const Tensor rows = x.contiguous(), scale = weight.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  const int64_t k = x.size(-1), size = x.element_size();
  const Type type = type_of(x);
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  at::parallel_for(0, k ? x.numel() / k : 0, kGrain, [&](int64_t i, int64_t last) {
    kernels().rms_norm(from + i * k * size, scale.const_data_ptr(), type, last - i, k, float(eps),
                       to + i * k * size);
  });
  return y;
}

// silu of the first half of each row of x [..., 2 F] times the second half -> [..., F].
Tensor silu_mul(const Tensor& x) {
  check_cpu(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) % 2 == 0, "x must be [..., 2 F], not ", x.sizes());
  const Tensor rows = x.contiguous();
  auto shape = x.sizes().vec();
  const int64_t f = shape.back() /= 2, size = x.element_size();
  Tensor y = at::empty(shape, x.options());
  const Type type = type_of(x);
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  at::parallel_for(0, f ? y.numel() / f : 0, kGrain, [&](int64_t i, int64_t last) {
    for (; i < last; i++) {
      const char* gate = from + 2 * i * f * size;
      kernels().silu_mul(gate, gate + f * size, type, f, to + i * f * size);
    }
  });
  return y;
}

// x [B, T, H, D] rotated by the angles of cos, sin [B or 1, T, 1, D / 2] fp32.
Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  check_cpu(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(3) % 2 == 0, "x must be [B, T, H, D], not ", x.sizes());
  const int64_t B = x.size(0), T = x.size(1), H = x.size(2), D = x.size(3), size = x.element_size();
  for (const Tensor* t : {&cos, &sin})
    TORCH_CHECK_VALUE(t->is_cpu() && t->scalar_type() == at::kFloat && t->dim() == 4 &&
                          (t->size(0) == B || t->size(0) == 1) && t->size(1) == T &&
                          t->size(2) == 1 && t->size(3) == D / 2,
                      "cos and sin must be fp32 [B or 1, T, 1, D / 2], not ", t->sizes());
  const Tensor heads = x.stride(3) == 1 ? x : x.contiguous();
  const Tensor c = cos.expand({B, T, 1, D / 2}).contiguous();
  const Tensor s = sin.expand({B, T, 1, D / 2}).contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  const Type type = type_of(x);
  const char* from = static_cast<const char*>(heads.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  at::parallel_for(0, B * T, kGrain, [&](int64_t i, int64_t last) {
    for (; i < last; i++) {
      const char* row = from + (i / T * heads.stride(0) + i % T * heads.stride(1)) * size;
      for (int64_t h = 0; h < H; h++)
        kernels().rotate(row + h * heads.stride(2) * size, type,
                         c.const_data_ptr<float>() + i * (D / 2),
                         s.const_data_ptr<float>() + i * (D / 2), D, to + (i * H + h) * D * size);
    }
  });
  return y;
}

// The index of the first of the largest of each row: [B, V] -> int64 [B].
Tensor greedy(const Tensor& logits) {
  check_cpu(logits, "logits");
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, "logits must be [B, V], not ",
                    logits.sizes());
  const Tensor rows = logits.contiguous();
  const int64_t V = rows.size(1);
  Tensor ids = at::empty({rows.size(0)}, rows.options().dtype(at::kLong));
  int64_t* to = ids.mutable_data_ptr<int64_t>();
  at::parallel_for(0, rows.size(0), 1, [&](int64_t b, int64_t last) {
    const auto* from = static_cast<const char*>(rows.const_data_ptr());
    for (; b < last; b++)
      to[b] = first_largest(from + b * V * rows.element_size(), type_of(rows), V);
  });
  return ids;
}

// The k largest of n numbers at `bits`, the largest first, of equals the first: their indices.
//
// Blocks whose largest number is below the k-th largest of these cannot hold any of them, which
// leaves little to sort.
template <class T>
void largest(const T* bits, int64_t n, int64_t k, int64_t* ids) {
  constexpr int64_t kBlock = 64;
  std::vector<T> tops;
  for (int64_t i = 0; i < n; i += kBlock) {
    T here = std::numeric_limits<T>::min();
    const int64_t end = std::min(i + kBlock, n);
#pragma omp simd reduction(max : here)
    for (int64_t j = i; j < end; j++) here = std::max(here, ordered(bits[j]));
    tops.push_back(here);
  }
  T least = std::numeric_limits<T>::min();
  if (k < int64_t(tops.size())) {
    std::vector<T> order = tops;
    std::nth_element(order.begin(), order.begin() + k - 1, order.end(), std::greater<T>());
    least = order[k - 1];
  }
  std::vector<std::pair<T, int64_t>> found;  // negated indices: one order for both
  for (size_t block = 0; block < tops.size(); block++)
    if (tops[block] >= least)
      for (int64_t j = block * kBlock; j < std::min<int64_t>((block + 1) * kBlock, n); j++)
        if (ordered(bits[j]) >= least) found.emplace_back(ordered(bits[j]), -j);
  std::partial_sort(found.begin(), found.begin() + k, found.end(), std::greater<>());
  for (int64_t i = 0; i < k; i++) ids[i] = -found[i].second;
}

// The indices of the k largest of each row, the largest first: [B, V] -> int64 [B, k].
Tensor top_k(const Tensor& logits, int64_t k) {
  check_cpu(logits, "logits");
  TORCH_CHECK_VALUE(logits.dim() == 2 && k >= 1 && k <= logits.size(1), "no ", k,
                    " largest of the rows of ", logits.sizes());
  const Tensor rows = logits.contiguous();
  const int64_t V = rows.size(1);
  const bool wide = type_of(rows) == Type::fp32;
  Tensor ids = at::empty({rows.size(0), k}, rows.options().dtype(at::kLong));
  int64_t* to = ids.mutable_data_ptr<int64_t>();
  at::parallel_for(0, rows.size(0), 1, [&](int64_t b, int64_t last) {
    const void* from = rows.const_data_ptr();
    for (; b < last; b++)
      if (wide) largest(static_cast<const int32_t*>(from) + b * V, V, k, to + b * k);
      else largest(static_cast<const int16_t*>(from) + b * V, V, k, to + b * k);
  });
  return ids;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flatllama, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor x) -> Tensor");
  m.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("greedy(Tensor logits) -> Tensor");
  m.def("top_k(Tensor logits, int k) -> Tensor");
}

TORCH_LIBRARY_IMPL(flatllama, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("silu_mul", silu_mul);
  m.impl("rotate", rotate);
  m.impl("greedy", greedy);
  m.impl("top_k", top_k);
}
