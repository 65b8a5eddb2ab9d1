// Attention, the choice of level, and the read bandwidth as operators.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <chrono>

#include "pieces.h"

using at::Tensor;
using OptTensor = const std::optional<Tensor>&;

namespace portable { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Whether this CPU has AMX with int8 and bf16 and the system lets this process use its tiles.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d = 0;
  constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

bool runs_here(const std::string& level) {
#if defined(__x86_64__)
  if (level == "amx") return runs_here("avx512bf16") && has_amx();
  if (level == "avx512bf16") return runs_here("avx512") && __builtin_cpu_supports("avx512bf16");
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

const Kernels* find_level(const std::string& level, bool emulated) {
  if (level == "best") {
    for (const char* name : {"amx", "avx512bf16", "avx512", "avx2"})
      if (runs_here(name)) return find_level(name, false);
    return &portable::kernels;
  }
  const Kernels* found = level == "portable" ? &portable::kernels : nullptr;
#if defined(__x86_64__)
  if (level == "amx") found = &amx::kernels;
  if (level == "avx512bf16") found = &avx512bf16::kernels;
  if (level == "avx512") found = &avx512::kernels;
  if (level == "avx2") found = &avx2::kernels;
#endif
  TORCH_CHECK_VALUE(found && (emulated || runs_here(level)), "CPU level '", level,
                    "' is unknown or this CPU lacks it: best, amx, avx512bf16, avx512, avx2 or portable");
  return found;
}

const Kernels* current = nullptr;

std::string set_cpu_level(std::string level, bool emulated) {
  current = find_level(level, emulated);
  return current->name;
}

}  // namespace

const Kernels& kernels() { return *current; }

Scratch::Scratch(int64_t bytes) {
  constexpr int64_t kLeast = 1 << 20, kMost = 16 << 20;
  thread_local std::unique_ptr<char[]> kept;
  thread_local int64_t size = 0;
  bytes = std::max(bytes, kLeast) + 64;
  if (bytes > kMost) {
    large_ = at::empty({bytes}, at::kByte);
    next_ = static_cast<char*>(large_.mutable_data_ptr());
  } else {
    if (bytes > size) {
      kept.reset();
      size = 0;
      kept.reset(new char[bytes]);
      size = bytes;
    }
    next_ = kept.get();
  }
  next_ = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(next_)));
}

namespace {

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
  p.softmax_scale = softmax_scale ? float(*softmax_scale) : 1.0f / std::sqrt(float(D));
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
  m.def("set_cpu_level(str level, bool emulated=False) -> str", set_cpu_level);
  m.def("read_bandwidth(int bytes, int? threads=None) -> float", read_bandwidth);
  m.def("attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor start, Tensor? k_scale=None, "
        "Tensor? v_scale=None, float? softmax_scale=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(flatllama, CPU, m) { m.impl("attention", attention); }
