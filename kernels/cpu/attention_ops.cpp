// Attention and the read bandwidth as operators.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <chrono>

#include "pieces.h"

using at::Tensor;
using OptTensor = const std::optional<Tensor>&;

namespace {

// q [B, H, T, D], caches [B, Hkv, S, D]; row t of batch b sees slots 0 .. start[b] + t.
Tensor attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& start,
                 OptTensor k_scale, OptTensor v_scale) {
  for (const Tensor& t : {q, k_cache, v_cache, start}) check_cpu(t, "an argument of attention");
  TORCH_CHECK_VALUE(q.dim() == 4 && k_cache.dim() == 4 && k_cache.sizes() == v_cache.sizes(),
                    "q must be [B, H, T, D], the caches [B, Hkv, S, D]");
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3);
  const int64_t Hkv = k_cache.size(1), S = k_cache.size(2), heads = Hkv ? H / Hkv : 0;
  TORCH_CHECK_VALUE(k_cache.size(0) == B && k_cache.size(3) == D && heads * Hkv == H,
                    "q ", q.sizes(), " does not fit caches ", k_cache.sizes());
  TORCH_CHECK_VALUE(start.scalar_type() == at::kLong && start.dim() == 1 && start.size(0) == B,
                    "start must be int64 [B]");
  const bool int8 = k_scale.has_value();
  TORCH_CHECK_VALUE(int8 == v_scale.has_value(), "give both cache scales or none");
  const auto cache_type = int8 ? at::kChar : q.scalar_type();
  TORCH_CHECK_TYPE(k_cache.scalar_type() == cache_type && v_cache.scalar_type() == cache_type,
                   "the caches must be ", cache_type);
  Tensor out = at::empty({B, H, T, D}, q.options());
  if (out.numel() == 0) return out;
  TORCH_CHECK_VALUE((k_cache.stride(3) == 1 && v_cache.stride(3) == 1) || D == 1,
                    "the caches' last dimension must be contiguous");

  Tensor kscales, vscales;
  if (int8) {
    TORCH_CHECK_VALUE(k_scale->numel() == B * Hkv * S && v_scale->numel() == B * Hkv * S,
                      "cache scales must be [B, Hkv, S]");
    TORCH_CHECK_TYPE(k_scale->scalar_type() == v_scale->scalar_type(), "cache scales of one dtype");
    kscales = k_scale->contiguous();
    vscales = v_scale->contiguous();
  }
  const Tensor starts = start.contiguous(), queries = q.contiguous();
  Pieces p{B, T, H, Hkv, D, S, type_of(q)};
  p.caches(k_cache, v_cache);
  p.q = static_cast<const char*>(queries.const_data_ptr());
  p.cache_scales(kscales, vscales);
  p.first = starts.const_data_ptr<int64_t>();
  p.y = static_cast<char*>(out.mutable_data_ptr());
  for (int i = 0; i < 3; i++) p.y_stride[i] = out.stride(i);
  p.softmax_scale = 1.0f / std::sqrt(float(D));
  const int64_t threads = at::get_num_threads();
  Scratch scratch(p.plan(threads));
  p.take(scratch, threads);
  at::parallel_for(0, p.count, 1, [&](int64_t i, int64_t last) {
    auto queries = [&](auto... where) { p.read_queries(where...); };
    auto nothing = [](int64_t, int64_t, int64_t, int64_t) {};
    for (; i < last; i++) p.run(i, at::get_thread_num(), queries, nothing);
  });
  for (int64_t r = 0; r < p.merges(); r++) p.merge(r);
  return out;
}

// Bytes per second that `threads` threads read from a buffer of `bytes`: the median of five passes.
double read_bandwidth(int64_t bytes, std::optional<int64_t> threads) {
  TORCH_CHECK_VALUE(bytes >= 1 << 20, "a buffer of at least 1 MiB");
  const int64_t workers = threads.value_or(at::get_num_threads()), before = at::get_num_threads();
  TORCH_CHECK_VALUE(workers >= 1, "at least one thread");
  const int64_t share = bytes / workers / 256 * 256;
  Tensor buffer = at::empty({share * workers}, at::kByte);
  auto* p = buffer.mutable_data_ptr<uint8_t>();
  at::set_num_threads(int(workers));
  std::vector<double> seconds;
  volatile float keep = 0;
  at::parallel_for(0, workers, 1, [&](int64_t i, int64_t j) {
    memset(p + i * share, 1, (j - i) * share);
  });
  for (int pass = 0; pass < 6; pass++) {
    auto begin = std::chrono::steady_clock::now();
    at::parallel_for(0, workers, 1, [&](int64_t i, int64_t j) {
      keep = kernels().read_sum(p + i * share, (j - i) * share);
    });
    std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    if (pass) seconds.push_back(took.count());
  }
  at::set_num_threads(int(before));
  std::sort(seconds.begin(), seconds.end());
  return double(share * workers) / seconds[2];
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flatllama, m) {
  m.def("read_bandwidth(int bytes, int? threads=None) -> float", read_bandwidth);
  m.def("attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor start, Tensor? k_scale=None, "
        "Tensor? v_scale=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(flatllama, CPU, m) { m.impl("attention", attention); }
