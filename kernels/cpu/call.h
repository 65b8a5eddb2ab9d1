// What the operators of products share: the checks, the result, and the split over threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include "ops.h"

using at::Tensor;
using OptTensor = const std::optional<Tensor>&;

namespace {

constexpr int64_t kFewRows = 16;      // up to here the float paths stream the weight themselves
constexpr int64_t kPanelRows = 512;   // rows of W that are widened at a time for many rows of x
constexpr int64_t kBytesPerThread = 32768;  // less than this is not worth waking a thread for

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

  // Many rows: W in fp32 panels of kPanelRows (widen(first tile, last tile, out)), then fp32 products.
  template <class F>
  void through_panels(const F& widen) {
    Tensor rows = x.reshape({a.m, a.k}).to(at::kFloat);
    Tensor panel = at::empty({std::min(a.n, kPanelRows), a.k}, rows.options());
    Tensor out = y.view({a.m, a.n});
    for (int64_t n = 0; n < a.n; n += kPanelRows) {
      int64_t count = std::min(kPanelRows, a.n - n), first = n / 16;
      float* to = panel.mutable_data_ptr<float>();
      at::parallel_for(0, div_up(count, 16), 4, [&](int64_t i, int64_t j) {
        widen(first + i, first + j, to + i * 16 * a.k);
      });
      Tensor part = at::mm(rows, panel.narrow(0, 0, count).t());
      if (bias.defined()) part.add_(bias.narrow(0, n, count));
      out.narrow(1, n, count).copy_(part);
    }
  }
};

}  // namespace
