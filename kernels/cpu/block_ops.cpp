// One transformer block for a few new tokens as one operator: one parallel region, in which the
// threads wait for each other only where one needs what another has written.
//
//   x += wo(attention(rotate(wqkv(norm(x)))))      x += w2(silu(w1(norm(x))) * w3(norm(x)))
//
// What is small (norms, the inputs' quantization) every thread computes for itself; what is large
// (the products, the cache) is shared out. Separate operators spend as long in their calls and in
// waking threads as in reading the weights of a small model.
#include <omp.h>
#include <torch/library.h>

#include "pieces.h"
#include "product.h"

namespace {

struct Block {
  int64_t B, T, M, C, H, Hkv, D, F, S, size;  // M = B T rows; sizes as in model.py; bytes a number
  Type type, scale_type;
  float eps;
  const char *x, *norm1, *norm2;
  const float *cos, *sin;                     // [M, D / 2]
  char *k_cache, *v_cache;
  char *k_scale = nullptr, *v_scale = nullptr;         // [B, Hkv, S] of scale_type: an int8 cache
  float *k_scale32 = nullptr, *v_scale32 = nullptr;    // the same in fp32, for attention
  Product wqkv, wo, w13, w2;
  Pieces attention{};
  char *qkv, *q, *heads, *projected, *middle, *gate_up, *hidden, *out;  // shared by the threads
  std::vector<char*> own;                     // normed rows and the products' input forms

  int64_t own_bytes() const {
    const int64_t most = std::max({wqkv.bytes(), wo.bytes(), w13.bytes(), w2.bytes()});
    return Scratch::round_up(M * C * size) + most;
  }

  // This thread's columns of a product of x, and then f(first column, last column).
  template <class F_>
  void product(const Product& p, const char* from, int rank, int threads, const F_& f) const {
    char* scratch = own[rank] + Scratch::round_up(M * C * size);
    const int64_t first = p.units() * rank / threads, last = p.units() * (rank + 1) / threads;
    if (first >= last) return;
    p.run(p.read(from, scratch), first, last);
    f(first * p.unit(), std::min(last * p.unit(), p.c.a.n));
  }

  void add_columns(const char* a, const char* b, char* to, int64_t first, int64_t last) const {
    for (int64_t m = 0; m < M; m++) {
      const int64_t at = (m * C + first) * size;
      kernels().add(a + at, b + at, type, last - first, to + at);
    }
  }

  // Head i of all the rows' H + 2 Hkv: queries rotated into q, keys and values into the cache.
  void place(int64_t i) const {
    const int64_t all = H + 2 * Hkv, m = i / all, h = i % all, b = m / T, t = m % T;
    const char* from = qkv + i * D * size;
    const float *c = cos + m * (D / 2), *s = sin + m * (D / 2);
    if (h < H) return kernels().rotate(from, type, c, s, D, q + ((b * H + h) * T + t) * D * size);
    const bool key = h < H + Hkv;
    const int64_t slot = attention.first[b] + t, head = key ? h - H : h - H - Hkv;
    const int64_t* stride = key ? attention.k_stride : attention.v_stride;
    char* to = (key ? k_cache : v_cache) +
               (b * stride[0] + head * stride[1] + slot * stride[2]) * attention.cache_size;
    alignas(64) char line[4 * 1024];
    if (key) kernels().rotate(from, type, c, s, D, k_scale ? line : to);
    if (!k_scale) {
      if (!key) memcpy(to, from, D * size);
      return;
    }
    const int64_t at = (b * Hkv + head) * S + slot;
    const float scale = kernels().quantize_slot(key ? line : from, type, D, scale_type,
                                                reinterpret_cast<int8_t*>(to));
    (key ? k_scale32 : v_scale32)[at] = scale;
    char* scales = key ? k_scale : v_scale;
    if (scale_type == Type::fp32) reinterpret_cast<float*>(scales)[at] = scale;
    else if (scale_type == Type::bf16) reinterpret_cast<at::BFloat16*>(scales)[at] = scale;
    else reinterpret_cast<at::Half*>(scales)[at] = scale;
  }

  template <class G>
  static void share(int64_t count, int rank, int threads, const G& g) {
    for (int64_t i = count * rank / threads; i < count * (rank + 1) / threads; i++) g(i);
  }

  // What thread `rank` of `threads` does.
  void run(int rank, int threads) const {
    char* normed = own[rank];
    auto nothing = [](int64_t, int64_t) {};
    kernels().rms_norm(x, norm1, type, M, C, eps, normed);
    product(wqkv, normed, rank, threads, nothing);
#pragma omp barrier
    share(M * (H + 2 * Hkv), rank, threads, [&](int64_t i) { place(i); });
#pragma omp barrier
    share(attention.count, rank, threads, [&](int64_t i) { attention.run(i, rank); });
#pragma omp barrier
    if (attention.merges()) {
      share(attention.merges(), rank, threads, [&](int64_t r) { attention.merge(r); });
#pragma omp barrier
    }
    product(wo, heads, rank, threads, [&](int64_t first, int64_t last) {
      add_columns(x, projected, middle, first, last);
    });
#pragma omp barrier
    kernels().rms_norm(middle, norm2, type, M, C, eps, normed);
    product(w13, normed, rank, threads, nothing);
#pragma omp barrier
    const int64_t pieces = div_up(F, 64);
    share(M * pieces, rank, threads, [&](int64_t i) {
      const int64_t m = i / pieces, first = i % pieces * 64, n = std::min<int64_t>(64, F - first);
      const char* gate = gate_up + (m * 2 * F + first) * size;
      kernels().silu_mul(gate, gate + F * size, type, n, hidden + (m * F + first) * size);
    });
#pragma omp barrier
    product(w2, hidden, rank, threads, [&](int64_t first, int64_t last) {
      add_columns(middle, projected, out, first, last);
    });
  }
};

const char* vector_of(const Tensor& t, int64_t count, Type type, const char* name) {
  check_cpu(t, name);
  TORCH_CHECK_VALUE(t.numel() == count && type_of(t) == type && t.is_contiguous(), name,
                    " must be ", count, " contiguous numbers of the right dtype");
  return static_cast<const char*>(t.const_data_ptr());
}

// x [B, T, C] -> [B, T, C], and the new keys and values into slots start[b] .. of the caches.
Tensor decode_block(const Tensor& x, const Tensor& norm1, const Tensor& norm2, double eps,
                    const Tensor& cos, const Tensor& sin, const Tensor& start,
                    const Tensor& k_cache, const Tensor& v_cache, OptTensor k_scale,
                    OptTensor v_scale, int64_t heads, const Tensors& wqkv, at::IntArrayRef wqkv_n,
                    const Tensors& wo, at::IntArrayRef wo_n, const Tensors& w13,
                    at::IntArrayRef w13_n, const Tensors& w2, at::IntArrayRef w2_n) {
  for (const Tensor& t : {x, k_cache, v_cache, start}) check_cpu(t, "an argument of decode_block");
  TORCH_CHECK_VALUE(x.dim() == 3 && k_cache.dim() == 4 && k_cache.sizes() == v_cache.sizes(),
                    "x must be [B, T, C], the caches [B, Hkv, S, D]");
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), M = B * T;
  const int64_t Hkv = k_cache.size(1), S = k_cache.size(2), D = k_cache.size(3);
  const Type type = type_of(x);
  Block b{B, T, M, C, heads, Hkv, D, w2_n[2], S, x.element_size(), type, type, float(eps)};
  const bool int8 = k_scale.has_value();
  TORCH_CHECK_VALUE(M >= 1 && M <= kFewRows && Hkv >= 1 && heads % Hkv == 0 && D % 2 == 0 &&
                        D <= 1024 && k_cache.size(0) == B,
                    "decode_block takes 1 to ", kFewRows, " rows, not ", x.sizes());
  TORCH_CHECK_VALUE(k_cache.stride(3) == 1 && v_cache.stride(3) == 1,
                    "the caches' last dimension must be contiguous");
  TORCH_CHECK_TYPE(k_cache.scalar_type() == (int8 ? at::kChar : x.scalar_type()) &&
                       v_cache.scalar_type() == k_cache.scalar_type(), "the caches' dtype");
  TORCH_CHECK_VALUE(start.scalar_type() == at::kLong && start.numel() == B, "start: int64 [B]");
  const Tensor rows = x.contiguous(), starts = start.contiguous();
  Tensor out = at::empty(rows.sizes(), rows.options()), kscales, vscales;
  b.x = static_cast<const char*>(rows.const_data_ptr());
  b.norm1 = vector_of(norm1, C, type, "the norm's weight");
  b.norm2 = vector_of(norm2, C, type, "the norm's weight");
  const Tensor c = cos.contiguous(), s = sin.contiguous();
  b.cos = reinterpret_cast<const float*>(vector_of(c, M * D / 2, Type::fp32, "cos"));
  b.sin = reinterpret_cast<const float*>(vector_of(s, M * D / 2, Type::fp32, "sin"));
  b.k_cache = static_cast<char*>(k_cache.mutable_data_ptr());
  b.v_cache = static_cast<char*>(v_cache.mutable_data_ptr());
  if (int8) {
    b.scale_type = type_of(*k_scale);
    b.k_scale = const_cast<char*>(vector_of(*k_scale, B * Hkv * S, b.scale_type, "k_scale"));
    b.v_scale = const_cast<char*>(vector_of(*v_scale, B * Hkv * S, b.scale_type, "v_scale"));
    kscales = k_scale->to(at::kFloat);
    vscales = v_scale->to(at::kFloat);
    b.k_scale32 = kscales.mutable_data_ptr<float>();
    b.v_scale32 = vscales.mutable_data_ptr<float>();
  }
  b.wqkv = Product(wqkv, wqkv_n, M, type);
  b.wo = Product(wo, wo_n, M, type);
  b.w13 = Product(w13, w13_n, M, type);
  b.w2 = Product(w2, w2_n, M, type);
  const int64_t width = (heads + 2 * Hkv) * D;
  auto fits = [](const Product& p, int64_t n, int64_t k) { return p.c.a.n == n && p.c.a.k == k; };
  TORCH_CHECK_VALUE(fits(b.wqkv, width, C) && fits(b.wo, C, heads * D) &&
                        fits(b.w13, 2 * b.F, C) && fits(b.w2, C, b.F),
                    "the layers' shapes do not make a transformer block");

  Pieces& p = b.attention;
  p = Pieces{B, T, heads, Hkv, D, S, type};
  p.caches(k_cache, v_cache);
  p.k_scale = b.k_scale32;
  p.v_scale = b.v_scale32;
  p.first = starts.const_data_ptr<int64_t>();
  p.y_stride[0] = T * heads * D;
  p.y_stride[1] = D;
  p.y_stride[2] = heads * D;
  p.softmax_scale = 1.0f / std::sqrt(float(D));

  const int threads = at::get_num_threads();
  const int64_t shared[] = {M * width, M * heads * D, M * heads * D, M * C, M * C, M * 2 * b.F,
                            M * b.F};
  int64_t bytes = p.plan(threads) + threads * b.own_bytes();
  for (int64_t count : shared) bytes += Scratch::round_up(count * b.size);
  Scratch scratch(bytes);
  p.take(scratch, threads);
  char** places[] = {&b.qkv, &b.q, &b.heads, &b.projected, &b.middle, &b.gate_up, &b.hidden};
  for (int i = 0; i < 7; i++) *places[i] = scratch.take<char>(shared[i] * b.size);
  for (int i = 0; i < threads; i++) b.own.push_back(scratch.take<char>(b.own_bytes()));
  b.out = static_cast<char*>(out.mutable_data_ptr());
  p.q = b.q;
  p.y = b.heads;
  b.wqkv.c.a.y = b.qkv;
  b.wo.c.a.y = b.w2.c.a.y = b.projected;
  b.w13.c.a.y = b.gate_up;
#pragma omp parallel num_threads(threads)
  b.run(omp_get_thread_num(), omp_get_num_threads());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flatllama, m) {
  m.def("decode_block(Tensor x, Tensor norm1, Tensor norm2, float eps, Tensor cos, Tensor sin, "
        "Tensor start, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, "
        "Tensor(d!)? v_scale, int heads, Tensor?[] wqkv, int[] wqkv_form, Tensor?[] wo, "
        "int[] wo_form, Tensor?[] w13, int[] w13_form, Tensor?[] w2, int[] w2_form) -> Tensor");
}

TORCH_LIBRARY_IMPL(flatllama, CPU, m) { m.impl("decode_block", decode_block); }
