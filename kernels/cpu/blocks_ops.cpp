// All transformer blocks for a few new tokens as one operator: one parallel region, in which the
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

// What the blocks share: sizes, the new tokens, and room for what passes between the stages.
struct Shared {
  int64_t B, T, M, C, H, Hkv, D, F, S, size;  // M = B T rows; sizes as in model.py; bytes a number
  Type type;
  float eps;
  const float *cos, *sin;                     // [M, D / 2]
  char *x, *qkv, *q, *heads, *projected, *middle, *gate_up, *hidden;
  std::vector<char*> own;                     // each thread's normed rows and products' inputs
};

struct Block : Shared {
  const char *norm1, *norm2;
  char *k_cache, *v_cache;
  char *k_scale = nullptr, *v_scale = nullptr;  // [B, Hkv, S] of attention.scale_type, or null
  Product wqkv, wo, w13, w2;
  Pieces attention{};

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
    const Type kind = attention.scale_type;
    const float scale = kernels().quantize_slot(key ? line : from, type, D, kind,
                                                reinterpret_cast<int8_t*>(to));
    char* scales = key ? k_scale : v_scale;
    if (kind == Type::fp32) reinterpret_cast<float*>(scales)[at] = scale;
    else if (kind == Type::bf16) reinterpret_cast<at::BFloat16*>(scales)[at] = scale;
    else reinterpret_cast<at::Half*>(scales)[at] = scale;
  }

  template <class G>
  static void share(int64_t count, int rank, int threads, const G& g) {
    for (int64_t i = count * rank / threads; i < count * (rank + 1) / threads; i++) g(i);
  }

  // What thread `rank` of `threads` does: x [M, C] in place.
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
      add_columns(middle, projected, x, first, last);
    });
#pragma omp barrier
  }
};

const char* vector_of(const Tensor& t, int64_t count, Type type, const char* name) {
  check_cpu(t, name);
  TORCH_CHECK_VALUE(t.numel() == count && type_of(t) == type && t.is_contiguous(), name,
                    " must be ", count, " contiguous numbers of the right dtype");
  return static_cast<const char*>(t.const_data_ptr());
}

// Takes the layers' forms, one after another, out of the flat lists that come from Python: for each
// the number of its tensors and of its numbers, then the numbers.
struct Forms {
  std::vector<std::optional<Tensor>> tensors;
  at::IntArrayRef numbers;
  size_t tensor = 0, number = 0;

  Product next(int64_t m, Type type, int64_t n, int64_t k) {
    TORCH_CHECK_VALUE(number + 2 <= numbers.size(), "too few forms");
    const size_t ts = numbers[number], ns = numbers[number + 1];
    TORCH_CHECK_VALUE(number + 2 + ns <= numbers.size() && tensor + ts <= tensors.size(),
                      "the forms do not fit their tensors");
    Product p(Tensors(tensors).slice(tensor, ts), numbers.slice(number + 2, ns), m, type);
    TORCH_CHECK_VALUE(p.c.a.n == n && p.c.a.k == k, "a layer is ", p.c.a.n, " x ", p.c.a.k,
                      ", but its place is ", n, " x ", k);
    tensor += ts;
    number += 2 + ns;
    return p;
  }
};

void check_caches(const Shared& s, const Tensor& k, const Tensor& v, bool int8, at::ScalarType type) {
  for (const Tensor* t : {&k, &v}) {
    check_cpu(*t, "a cache");
    TORCH_CHECK_VALUE(t->sizes() == at::IntArrayRef({s.B, s.Hkv, s.S, s.D}) && t->stride(3) == 1,
                      "the caches must be [B, Hkv, S, D]");
    TORCH_CHECK_TYPE(t->scalar_type() == (int8 ? at::kChar : type), "the caches' dtype");
  }
}

// x [B, T, C] -> [B, T, C], and the new keys and values into slots start[b] .. of the caches.
Tensor decode_blocks(const Tensor& x, at::TensorList norms, double eps, const Tensor& cos,
                     const Tensor& sin, const Tensor& start, at::TensorList k_caches,
                     at::TensorList v_caches, at::TensorList k_scales, at::TensorList v_scales,
                     int64_t heads, int64_t ffn, const c10::List<std::optional<Tensor>>& tensors,
                     at::IntArrayRef forms) {
  check_cpu(x, "x");
  const size_t count = k_caches.size();
  const bool int8 = !k_scales.empty();
  TORCH_CHECK_VALUE(x.dim() == 3 && count > 0 && k_caches[0].dim() == 4 &&
                        v_caches.size() == count && norms.size() == 2 * count &&
                        k_scales.size() == v_scales.size() &&
                        (!int8 || k_scales.size() == count),
                    "x must be [B, T, C], with two norms and two caches for each block");
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), M = B * T;
  const int64_t Hkv = k_caches[0].size(1), S = k_caches[0].size(2), D = k_caches[0].size(3);
  const Type type = type_of(x);
  TORCH_CHECK_VALUE(M >= 1 && M <= kFewRows && Hkv >= 1 && heads % Hkv == 0 && D % 2 == 0 &&
                        D <= 1024,
                    "decode_blocks takes 1 to ", kFewRows, " rows, not ", x.sizes());
  TORCH_CHECK_VALUE(start.is_cpu() && start.scalar_type() == at::kLong && start.numel() == B,
                    "start must be int64 [B]");
  Shared s{B, T, M, C, heads, Hkv, D, ffn, S, x.element_size(), type, float(eps)};
  const Tensor starts = start.contiguous(), c = cos.contiguous(), n = sin.contiguous();
  s.cos = reinterpret_cast<const float*>(vector_of(c, M * D / 2, Type::fp32, "cos"));
  s.sin = reinterpret_cast<const float*>(vector_of(n, M * D / 2, Type::fp32, "sin"));
  Tensor out = x.clone(at::MemoryFormat::Contiguous);
  s.x = static_cast<char*>(out.mutable_data_ptr());

  const int threads = at::get_num_threads();
  const int64_t width = (heads + 2 * Hkv) * D;
  Forms form{tensors.vec(), forms};
  std::vector<Block> blocks;
  blocks.reserve(count);
  int64_t own_bytes = 0, attention_bytes = 0;
  for (size_t i = 0; i < count; i++) {
    Block& b = blocks.emplace_back(Block{s});
    check_caches(s, k_caches[i], v_caches[i], int8, x.scalar_type());
    b.norm1 = vector_of(norms[2 * i], C, type, "the norm's weight");
    b.norm2 = vector_of(norms[2 * i + 1], C, type, "the norm's weight");
    b.k_cache = static_cast<char*>(k_caches[i].mutable_data_ptr());
    b.v_cache = static_cast<char*>(v_caches[i].mutable_data_ptr());
    Pieces& p = b.attention;
    p = Pieces{B, T, heads, Hkv, D, S, type};
    p.caches(k_caches[i], v_caches[i]);
    if (int8) {
      p.scale_type = type_of(k_scales[i]);
      p.k_scale = vector_of(k_scales[i], B * Hkv * S, p.scale_type, "k_scale");
      p.v_scale = vector_of(v_scales[i], B * Hkv * S, p.scale_type, "v_scale");
      b.k_scale = const_cast<char*>(p.k_scale);
      b.v_scale = const_cast<char*>(p.v_scale);
    }
    p.first = starts.const_data_ptr<int64_t>();
    p.y_stride[0] = T * heads * D;
    p.y_stride[1] = D;
    p.y_stride[2] = heads * D;
    p.softmax_scale = 1.0f / std::sqrt(float(D));
    attention_bytes = p.plan(threads);
    b.wqkv = form.next(M, type, width, C);
    b.wo = form.next(M, type, C, heads * D);
    b.w13 = form.next(M, type, 2 * ffn, C);
    b.w2 = form.next(M, type, C, ffn);
    own_bytes = std::max(own_bytes, b.own_bytes());
  }

  char** places[] = {&s.qkv, &s.q, &s.heads, &s.projected, &s.middle, &s.gate_up, &s.hidden};
  const int64_t wide = heads * D, sizes[] = {width, wide, wide, C, C, 2 * ffn, ffn};
  int64_t bytes = attention_bytes + threads * Scratch::round_up(own_bytes);
  for (int64_t size : sizes) bytes += Scratch::round_up(M * size * s.size);
  Scratch scratch(bytes);
  blocks[0].attention.take(scratch, threads);
  for (int i = 0; i < 7; i++) *places[i] = scratch.take<char>(M * sizes[i] * s.size);
  for (int i = 0; i < threads; i++) s.own.push_back(scratch.take<char>(own_bytes));
  for (Block& b : blocks) {
    static_cast<Shared&>(b) = s;
    b.attention.parts = blocks[0].attention.parts;
    b.attention.own = blocks[0].attention.own;
    b.attention.q = s.q;
    b.attention.y = s.heads;
    b.wqkv.c.a.y = s.qkv;
    b.wo.c.a.y = b.w2.c.a.y = s.projected;
    b.w13.c.a.y = s.gate_up;
  }
#pragma omp parallel num_threads(threads)
  for (const Block& b : blocks) b.run(omp_get_thread_num(), omp_get_num_threads());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flatllama, m) {
  m.def("decode_blocks(Tensor x, Tensor[] norms, float eps, Tensor cos, Tensor sin, Tensor start, "
        "Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor(c!)[] k_scales, "
        "Tensor(d!)[] v_scales, int heads, int ffn, Tensor?[] tensors, int[] forms) -> Tensor");
}

TORCH_LIBRARY_IMPL(flatllama, CPU, m) { m.impl("decode_blocks", decode_blocks); }
