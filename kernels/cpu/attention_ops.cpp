// Attention, the choice of level, and the read bandwidth as operators.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <chrono>

#include "ops.h"

using at::Tensor;
using OptTensor = const std::optional<Tensor>&;

namespace portable { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

namespace {

bool runs_here(const std::string& level) {
#if defined(__x86_64__)
  if (level == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
  if (level == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#endif
  return level == "portable";
}

const Kernels* find_level(const std::string& level) {
  if (level == "best") {
    for (const char* name : {"avx512", "avx2"})
      if (runs_here(name)) return find_level(name);
    return &portable::kernels;
  }
  TORCH_CHECK_VALUE(runs_here(level), "CPU level '", level, "' is unknown or this CPU lacks it: best, "
                    "avx512, avx2 or portable");
#if defined(__x86_64__)
  if (level == "avx512") return &avx512::kernels;
  if (level == "avx2") return &avx2::kernels;
#endif
  return &portable::kernels;
}

const Kernels* current = nullptr;

std::string set_cpu_level(std::string level) {
  current = find_level(level);
  return current->name;
}

}  // namespace

const Kernels& kernels() { return *current; }

Scratch::Scratch(int64_t bytes) {
  constexpr int64_t kKept = 1 << 20;
  if (bytes > kKept) {
    large_ = at::empty({bytes + 64}, at::kByte);
    next_ = static_cast<char*>(large_.mutable_data_ptr());
  } else {
    thread_local std::unique_ptr<char[]> kept(new char[kKept + 64]);
    next_ = kept.get();
  }
  next_ = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(next_)));
}

namespace {

const void* slot_zero(const Tensor& cache, int64_t b, int64_t h) {
  return static_cast<const char*>(cache.const_data_ptr()) +
         (b * cache.stride(0) + h * cache.stride(1)) * cache.element_size();
}

// q [B, H, T, D], caches [B, Hkv, S, D]; row t of batch b sees slots 0 .. start[b] + t.
Tensor attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& start,
                 OptTensor k_scale, OptTensor v_scale, std::optional<double> softmax_scale) {
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

  Tensor starts = start.contiguous(), kscales, vscales;
  const int64_t* first = starts.const_data_ptr<int64_t>();
  int64_t most = 0;
  for (int64_t b = 0; b < B; b++) {
    TORCH_CHECK_INDEX(first[b] >= 0 && first[b] + T <= S, "rows ", first[b], " to ", first[b] + T - 1,
                      " do not fit a cache of ", S, " slots");
    most = std::max(most, first[b] + T);
  }
  if (int8) {
    TORCH_CHECK_VALUE(k_scale->numel() == B * Hkv * S && v_scale->numel() == B * Hkv * S,
                      "cache scales must be [B, Hkv, S]");
    kscales = k_scale->to(at::kFloat).contiguous();
    vscales = v_scale->to(at::kFloat).contiguous();
  }

  // A piece of work: a kv head of a batch, a chunk of tokens, a stretch of slots. Few tokens are
  // split over the cache, to have work for all threads; many are split among themselves.
  const int64_t chunk = std::min<int64_t>(T, 64), chunks = (T + chunk - 1) / chunk;
  const int64_t pairs = B * Hkv, threads = at::get_num_threads(), rows = heads * chunk;
  int64_t splits = chunks > 1 ? 1 : (4 * threads + pairs - 1) / pairs;
  splits = std::max<int64_t>(1, std::min(splits, most / (2 * kAttentionBlock)));
  const int64_t stretch =
      (most + splits * kAttentionBlock - 1) / (splits * kAttentionBlock) * kAttentionBlock;
  const int64_t part_size = rows * (padded(D) + 2), own_size = attention_scratch(D) + rows * D;
  Scratch scratch(Scratch::round_up(pairs * chunks * splits * part_size * 4) +
                  Scratch::round_up(threads * own_size * 4));
  float* parts = scratch.take<float>(pairs * chunks * splits * part_size);
  float* own = scratch.take<float>(threads * own_size);
  const Tensor queries = q.contiguous();
  const auto* from = static_cast<const char*>(queries.const_data_ptr());
  const Type type = type_of(q);
  const float scale = softmax_scale ? float(*softmax_scale) : 1.0f / std::sqrt(float(D));

  at::parallel_for(0, pairs * chunks * splits, 1, [&](int64_t i, int64_t last) {
    float* wide = own + at::get_thread_num() * own_size;
    for (; i < last; i++) {
      const int64_t pair = i / splits / chunks, b = pair / Hkv, h = pair % Hkv, split = i % splits;
      int64_t c = i / splits % chunks;
      c = c % 2 ? chunks - 1 - c / 2 : c / 2;  // late tokens cost most: pair them with early ones
      Attention a{};
      a.tokens = std::min(chunk, T - c * chunk);
      a.rows = heads * a.tokens;
      a.first = first[b] + c * chunk;
      for (int64_t g = 0; g < heads; g++)
        kernels().widen_rows(from + ((pair * heads + g) * T + c * chunk) * D * q.element_size(), type,
                             1, a.tokens * D, a.tokens * D, false, wide + g * a.tokens * D);
      for (int64_t j = 0; j < a.rows * D; j++) wide[j] *= scale;
      a.q = wide;
      a.k = slot_zero(k_cache, b, h);
      a.v = slot_zero(v_cache, b, h);
      a.k_scale = int8 ? kscales.const_data_ptr<float>() + pair * S : nullptr;
      a.v_scale = int8 ? vscales.const_data_ptr<float>() + pair * S : nullptr;
      a.d = D;
      a.k_stride = k_cache.stride(2);
      a.v_stride = v_cache.stride(2);
      a.type = type;
      a.out = parts + i * part_size;
      a.max = a.out + a.rows * padded(D);
      a.sum = a.max + a.rows;
      a.scratch = wide + rows * D;
      kernels().attend(a, split * stretch, std::min((split + 1) * stretch, a.first + a.tokens));
      for (int64_t r = 0; splits == 1 && r < a.rows; r++)
        kernels().merge(a.out, 1, part_size, a.rows, r, D, type, out.mutable_data_ptr(),
                        ((pair * heads + r / a.tokens) * T + c * chunk + r % a.tokens) * D);
    }
  });
  for (int64_t r = 0; splits > 1 && r < pairs * rows; r++)
    kernels().merge(parts + r / rows * splits * part_size, splits, part_size, rows, r % rows, D, type,
                    out.mutable_data_ptr(), r * D);
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
  m.def("set_cpu_level(str level) -> str", set_cpu_level);
  m.def("read_bandwidth(int bytes, int? threads=None) -> float", read_bandwidth);
  m.def("attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor start, Tensor? k_scale=None, "
        "Tensor? v_scale=None, float? softmax_scale=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(flatllama, CPU, m) { m.impl("attention", attention); }
