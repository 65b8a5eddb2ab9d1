// The Transformer on a few new tokens as one operator, from their ids to their logits, or to the
// likeliest next ones: one parallel region, in which the threads wait for each other only where one
// needs what another has written.
//
//   x = embedding[token]
//   x += wo(attention(rotate(wqkv(norm(x)))))      x += w2(silu(w1(norm(x))) * w3(norm(x)))
//   logits = output(norm(x))
//
// What is small (norms, the inputs' quantization) every thread computes for itself; what is large
// (the products, the cache) is shared out. Separate operators spend as long in their calls and in
// waking threads as in reading the weights of a small model; so do hundreds of arguments, which
// therefore come once (plan_decode) and not with every call.
#include <ATen/ops/from_blob.h>
#include <omp.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <set>
#include <thread>

#include "choose.h"
#include "pieces.h"
#include "product.h"

namespace {

void ask(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// Where threads wait for each other. Meanwhile each asks for the memory that it reads next, which
// would stand still otherwise: the waits are a tenth of a small model's step.
class Meeting {
 public:
  void wait(int threads, const void* next, int64_t bytes) {
    constexpr int64_t kMost = 16 << 10, kAtOnce = 256;  // bytes; those who still work read too
    constexpr int kPatience = 1 << 14;                  // from then on others may have the core
    const auto* p = static_cast<const char*>(next);
    const char* end = p + std::min(bytes, kMost);
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; round_.load(std::memory_order_acquire) == round; i++) {
      if (p < end) {
        ask(p, kAtOnce);
        p += kAtOnce;
      } else if (i > kPatience) {
        std::this_thread::yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

constexpr int64_t kMostRows = 128;  // of a call
constexpr int64_t kCached = 32768;  // bytes of a weight that are still in a cache when read again

struct Block {
  Tensor norm1, norm2, k_cache, v_cache;
  Tensor q_norm, k_norm;    // of each head, before the rotation; or none
  Tensor k_scale, v_scale;  // none: a cache of x's dtype
  Product wqkv, wo, w13, w2;
};

// What is known before the tokens come; sizes as in model.py.
struct Plan {
  int64_t C, H, Hkv, D, F, S;
  at::ScalarType dtype;
  float eps;
  std::vector<Block> blocks;
  Tensor norm, cos, sin;  // the last norm; the rotary tables [S, D / 2]
  Product output;
  int64_t self[2];  // the numbers that Python holds: this address, most_rows()

  std::vector<const Product*> products() const {
    std::vector<const Product*> all{&output};
    for (const Block& b : blocks) all.insert(all.end(), {&b.wqkv, &b.wo, &b.w13, &b.w2});
    return all;
  }

  // How many rows a call may have. Without AVX-512 more of them are faster in the modules' products.
  int64_t most_rows() const {
    bool apart = true;
    for (const Product* p : products()) apart = apart && p->rows_apart();
    return apart && kernels().lanes == 16 ? kMostRows : kFewRows;
  }

  // Scratch for a group of m rows: normed, and in the form that a product takes.
  int64_t group_bytes(int64_t m) const {
    int64_t most = 0;
    for (const Product* p : products()) most = std::max(most, p->bytes(m));
    return Scratch::round_up(m * C * 4) + Scratch::round_up(most);
  }
};

// One call: its rows, and room for what passes between the stages.
struct Step {
  const Plan& plan;
  Type type;
  int64_t size, B, T, M, group_bytes;  // bytes of a number; M = B T rows
  const int64_t* last;               // [B], the row of each sequence whose logits are wanted; or all
  char* logits;                      // [M or B, V]
  int64_t* best;                     // [threads, M], each thread's first of the largest; or null
  char *x, *qkv, *heads, *projected, *middle, *gate_up, *hidden, *groups;
  Coded* forms;                      // of each group of rows, for the product that comes next
  Pieces attention{};                // of a block whose caches are still to be set
  Meeting* meeting;

  // Where the rows of a product's x begin that lie one behind the other.
  auto rows_of(const char* from, const Product& p) const {
    return [=, bytes = p.c.a.k * size](int64_t r) { return from + r * bytes; };
  }

  // Waits for the other threads, to go on with its share of units [0, units) of a product.
  void meet(int rank, int threads, const Product& next, int64_t units) const {
    const int64_t first = units * rank / threads, last = units * (rank + 1) / threads;
    meeting->wait(threads, static_cast<const char*>(next.c.a.w) + first * next.unit_bytes(),
                  (last - first) * next.unit_bytes());
  }

  // Brings `rows` rows of x into the form that product p takes, for a result in y; row(m) is where
  // row m begins, and norm, unless null, the weight of the norm before. Where p does not take all of
  // them at once they go in groups, which the threads share out; a single group every thread brings in
  // for itself, which saves a wait.
  template <class Row>
  void read(const Product& p, Row&& row, const Tensor* norm, int64_t rows, char* y, int rank,
            int threads) const {
    const int64_t most = p.at_once(rows), count = div_up(rows, most);
    for (int64_t g = rank; g < (count > 1 ? count : threads); g += threads) {
      const int64_t m0 = count > 1 ? g * most : 0, m = std::min(most, rows - m0);
      char *normed = groups + g * group_bytes, *form = normed + Scratch::round_up(m * plan.C * 4);
      for (int64_t r = 0; norm && r < m; r++)
        kernels().rms_norm(row(m0 + r), norm->const_data_ptr(), type, 1, plan.C, plan.eps,
                           normed + r * plan.C * size);
      forms[g] = p.read(norm ? normed : row(m0), m, y + m0 * p.c.a.n * size, form);
    }
    if (count > 1) meet(rank, threads, p, p.units());
  }

  // Units [first, last) of a product of so many rows, which were read.
  void run_units(const Product& p, int64_t rows, int64_t first, int64_t last, int rank) const {
    const int64_t count = div_up(rows, p.at_once(rows));
    if (count == 1) return p.run(forms[rank], first, last);
    // so few at a time that all groups but the first find them in the cache
    const int64_t some = std::max<int64_t>(1, kCached / p.unit_bytes());
    for (; first < last; first += some)
      for (int64_t g = 0; g < count; g++)
        p.run(forms[g], first, std::min(first + some, last));
  }

  // This thread's columns of a product, and then work(first column, last column).
  template <class Row, class Work>
  void multiply(const Product& p, Row&& row, const Tensor* norm, int64_t rows, char* y, int rank,
                int threads, Work&& work) const {
    const int64_t first = p.units() * rank / threads, last = p.units() * (rank + 1) / threads;
    read(p, row, norm, rows, y, rank, threads);
    if (first >= last) return;
    run_units(p, rows, first, last, rank);
    work(first * p.unit(), std::min(last * p.unit(), p.c.a.n));
  }

  // What thread `rank` of `threads` does in a block: x [M, C] in place. Then come the weight of a norm
  // and a product.
  void run(const Block& block, const Tensor& norm, const Product& next, int rank,
           int threads) const {
    Pieces pieces = attention;
    pieces.caches(block.k_cache, block.v_cache);
    pieces.cache_scales(block.k_scale, block.v_scale);

    // This thread's share of `count` pieces of work.
    auto share = [&](int64_t count, auto&& work) {
      for (int64_t i = count * rank / threads; i < count * (rank + 1) / threads; i++) work(i);
    };
    auto product = [&](const Product& p, const char* from, const Tensor* norm, char* to,
                       auto&& work) {
      multiply(p, rows_of(from, p), norm, M, to, rank, threads, work);
    };
    auto add = [&](const char* a, const char* b, char* to) {
      return [=, this](int64_t first, int64_t last) {
        for (int64_t m = 0; m < M; m++) {
          const int64_t at = (m * plan.C + first) * size;
          kernels().add(a + at, b + at, type, last - first, to + at);
        }
      };
    };
    auto nothing = [](int64_t, int64_t) {};

    product(block.wqkv, x, &block.norm1, qkv, nothing);
    meet(rank, threads, block.wo, block.wo.units());
    auto queries = [&](auto... where) { rotated_queries(block, pieces, where...); };
    auto fill = [&](auto... where) { fill_slots(block, pieces, where...); };
    share(pieces.count, [&](int64_t i) { pieces.run(i, rank, queries, fill); });
    meet(rank, threads, block.wo, block.wo.units());
    if (pieces.merges()) {
      share(pieces.merges(), [&](int64_t r) { pieces.merge(r); });
      meet(rank, threads, block.wo, block.wo.units());
    }
    ask(block.norm2.const_data_ptr(), block.norm2.nbytes());
    product(block.wo, heads, nullptr, projected, add(x, projected, middle));
    meet(rank, threads, block.w13, plan.F / block.w13.unit());
    gated(block.w13, block.norm2, rank, threads);
    meet(rank, threads, block.w2, block.w2.units());
    ask(norm.const_data_ptr(), norm.nbytes());
    product(block.w2, hidden, nullptr, projected, add(middle, projected, x));
    meet(rank, threads, next, next.units());
  }

  // hidden = silu(gate) * up. A thread makes the gate's and up's numbers of the same columns and
  // goes on without a wait, unless up's first column lies within a unit.
  void gated(const Product& p, const Tensor& norm, int rank, int threads) const {
    const auto row = rows_of(middle, p);
    const int64_t F = plan.F, units = F / p.unit();
    auto silu = [&](int64_t first, int64_t last) {
      for (int64_t m = 0; m < M; m++) {
        const char* gate = gate_up + (m * 2 * F + first) * size;
        kernels().silu_mul(gate, gate + F * size, type, last - first, hidden + (m * F + first) * size);
      }
    };
    if (F % p.unit()) {
      multiply(p, row, &norm, M, gate_up, rank, threads, [](int64_t, int64_t) {});
      meet(rank, threads, p, 0);
      silu(F * rank / threads, F * (rank + 1) / threads);
      return;
    }
    const int64_t first = units * rank / threads, last = units * (rank + 1) / threads;
    read(p, row, &norm, M, gate_up, rank, threads);
    if (first >= last) return;
    run_units(p, M, first, last, rank);
    run_units(p, M, units + first, units + last, rank);
    silu(first * p.unit(), last * p.unit());
  }

  // What it does after the blocks: the logits of all rows, or of rows `last`.
  void head(int rank, int threads) const {
    auto row = [&](int64_t r) { return x + (last ? r * T + last[r] : r) * plan.C * size; };
    auto find = [&](int64_t begin, int64_t end) {
      for (int64_t r = 0; best && r < M; r++)
        best[rank * M + r] = begin + first_largest(logit(r, begin), type, end - begin);
    };
    multiply(plan.output, row, &plan.norm, last ? B : M, logits, rank, threads, find);
  }

  char* logit(int64_t r, int64_t i) const { return logits + (r * plan.output.c.a.n + i) * size; }

  // The first of the largest logits of row r, once all threads have found theirs.
  int64_t choose(int64_t r, int threads) const {
    std::vector<int64_t> ids;
    std::vector<char> values;
    for (int i = 0; i < threads; i++) {
      const int64_t id = best[i * M + r];
      if (id < 0) continue;  // no columns
      ids.push_back(id);
      values.insert(values.end(), logit(r, id), logit(r, id) + size);
    }
    return ids[first_largest(values.data(), type, ids.size())];
  }

  const char* projection(int64_t b, int64_t t, int64_t head) const {
    return qkv + ((b * T + t) * (plan.H + 2 * plan.Hkv) + head) * plan.D * size;
  }

  // A head of a query or key, normed if there is a norm, and rotated.
  void rotate(const char* from, const Tensor& norm, int64_t slot, char* to) const {
    const int64_t half = plan.D / 2;
    alignas(64) char normed[4 * 1024];
    if (norm.defined()) {
      kernels().rms_norm(from, norm.const_data_ptr(), type, 1, plan.D, plan.eps, normed);
      from = normed;
    }
    kernels().rotate(from, type, plan.cos.const_data_ptr<float>() + slot * half,
                     plan.sin.const_data_ptr<float>() + slot * half, plan.D, to);
  }

  // As Pieces::read_queries, out of the projections.
  void rotated_queries(const Block& block, const Pieces& p, int64_t b, int64_t h, int64_t t0,
                       int64_t tokens, float* to) const {
    alignas(64) char line[4 * 1024];
    for (int64_t g = 0; g < p.heads; g++)
      for (int64_t t = t0; t < t0 + tokens; t++, to += plan.D) {
        rotate(projection(b, t, h * p.heads + g), block.q_norm, p.first[b] + t, line);
        kernels().widen_rows(line, type, 1, plan.D, plan.D, false, to);
      }
  }

  // The new keys and values of sequence b and kv head h in slots [begin, end), into the cache.
  void fill_slots(const Block& block, const Pieces& p, int64_t b, int64_t h, int64_t begin,
                  int64_t end) const {
    const Plan& s = plan;
    const bool int8 = block.k_scale.defined();
    alignas(64) char line[4 * 1024];
    auto place = [&](const char* from, const Tensor& cache, const int64_t* stride,
                     const Tensor& scales, int64_t slot) {
      char* to = static_cast<char*>(cache.mutable_data_ptr()) +
                 (b * stride[0] + h * stride[1] + slot * stride[2]) * p.cache_size;
      if (!int8) {
        memcpy(to, from, s.D * size);
        return;
      }
      const float scale =
          kernels().quantize_slot(from, type, s.D, p.scale_type, reinterpret_cast<int8_t*>(to));
      const int64_t at = (b * s.Hkv + h) * s.S + slot;
      if (p.scale_type == Type::fp32) scales.mutable_data_ptr<float>()[at] = scale;
      else if (p.scale_type == Type::bf16) scales.mutable_data_ptr<at::BFloat16>()[at] = scale;
      else scales.mutable_data_ptr<at::Half>()[at] = scale;
    };
    for (int64_t slot = std::max(begin, p.first[b]); slot < end; slot++) {
      const int64_t t = slot - p.first[b];
      rotate(projection(b, t, s.H + h), block.k_norm, slot, line);
      place(line, block.k_cache, p.k_stride, block.k_scale, slot);
      place(projection(b, t, s.H + s.Hkv + h), block.v_cache, p.v_stride, block.v_scale, slot);
    }
  }
};

void check_vector(const Tensor& t, int64_t count, at::ScalarType dtype, const char* name) {
  check_cpu(t, name);
  TORCH_CHECK_VALUE(t.numel() == count && t.scalar_type() == dtype && t.is_contiguous(), name,
                    " must be ", count, " contiguous numbers of the right dtype");
}

// Takes the layers' forms, one after another, out of the flat lists that come from Python: for each
// the number of its tensors and of its numbers, then the numbers.
struct Forms {
  std::vector<std::optional<Tensor>> tensors;
  at::IntArrayRef numbers;
  size_t tensor = 0, number = 0;

  Product next(Type type, int64_t n, int64_t k) {
    TORCH_CHECK_VALUE(number + 2 <= numbers.size(), "too few forms");
    const size_t ts = numbers[number], ns = numbers[number + 1];
    TORCH_CHECK_VALUE(number + 2 + ns <= numbers.size() && tensor + ts <= tensors.size(),
                      "the forms do not fit their tensors");
    Product p(Tensors(tensors).slice(tensor, ts), numbers.slice(number + 2, ns), type);
    TORCH_CHECK_VALUE(p.c.a.n == n && p.c.a.k == k, "a layer is ", p.c.a.n, " x ", p.c.a.k,
                      ", but its place is ", n, " x ", k);
    tensor += ts;
    number += 2 + ns;
    return p;
  }
};

void check_caches(const Block& b, const Block& first, at::ScalarType dtype) {
  const bool int8 = b.k_scale.defined();
  for (const Tensor* t : {&b.k_cache, &b.v_cache}) {
    check_cpu(*t, "a cache");
    TORCH_CHECK_VALUE(t->dim() == 4 && t->sizes() == first.k_cache.sizes() && t->stride(3) == 1,
                      "the caches must all be [B, Hkv, S, D]");
    TORCH_CHECK_TYPE(t->scalar_type() == (int8 ? at::kChar : dtype), "the caches' dtype");
  }
  TORCH_CHECK_VALUE(int8 == first.k_scale.defined(), "the caches must be of one kind");
  for (const Tensor* t : {&b.k_scale, &b.v_scale})
    if (int8)
      check_vector(*t, t->numel(), first.k_scale.scalar_type(), "cache scales");
  const int64_t slots = b.k_cache.numel() / b.k_cache.size(3);
  TORCH_CHECK_VALUE(!int8 || (b.k_scale.numel() == slots && b.v_scale.numel() == slots),
                    "cache scales must be [B, Hkv, S]");
}

// The plans whose handles are alive, so that no other number is ever taken for one.
std::mutex mutex;
std::set<const Plan*> plans;

// What `decode` needs of a model and its caches: int64 [2], a handle, which owns the plan, and how many
// rows it takes. The norms: two of each block, and the last one; of the heads: the queries' and the keys'
// of each block, or none; the forms: four of each block, and the head's.
Tensor plan_decode(at::TensorList norms, at::TensorList head_norms, double eps, const Tensor& cos,
                   const Tensor& sin, at::TensorList k_caches, at::TensorList v_caches, at::TensorList k_scales,
                   at::TensorList v_scales, int64_t heads, int64_t ffn, int64_t vocabulary,
                   const c10::List<std::optional<Tensor>>& tensors, at::IntArrayRef forms) {
  const size_t count = k_caches.size();
  const bool int8 = !k_scales.empty();
  TORCH_CHECK_VALUE(count > 0 && k_caches[0].dim() == 4 && v_caches.size() == count &&
                        norms.size() == 2 * count + 1 && k_scales.size() == v_scales.size() &&
                        (!int8 || k_scales.size() == count),
                    "give two norms and two caches [B, Hkv, S, D] for each block");
  auto plan = std::make_unique<Plan>();
  const int64_t C = plan->C = norms[0].numel();
  const int64_t Hkv = plan->Hkv = k_caches[0].size(1), D = plan->D = k_caches[0].size(3);
  plan->H = heads;
  plan->S = k_caches[0].size(2);
  plan->F = ffn;
  plan->dtype = norms[0].scalar_type();
  plan->eps = float(eps);
  TORCH_CHECK_VALUE(Hkv >= 1 && heads % Hkv == 0 && D >= 2 && D % 2 == 0 && D <= 1024,
                    "no attention of ", heads, " heads of ", D, " on ", Hkv);
  for (const Tensor& norm : norms) check_vector(norm, C, plan->dtype, "a norm's weight");
  TORCH_CHECK_VALUE(head_norms.empty() || head_norms.size() == 2 * count,
                    "give two norms of heads for each block, or none");
  for (const Tensor& norm : head_norms) check_vector(norm, D, plan->dtype, "a head norm's weight");
  for (const Tensor* t : {&cos, &sin}) check_vector(*t, plan->S * D / 2, at::kFloat, "cos or sin");
  plan->norm = norms[2 * count];
  plan->cos = cos;
  plan->sin = sin;
  Forms form{tensors.vec(), forms};
  const Type type = type_of(norms[0]);
  for (size_t i = 0; i < count; i++) {
    Block b{norms[2 * i], norms[2 * i + 1], k_caches[i], v_caches[i]};
    if (!head_norms.empty()) {
      b.q_norm = head_norms[2 * i];
      b.k_norm = head_norms[2 * i + 1];
    }
    if (int8) {
      b.k_scale = k_scales[i];
      b.v_scale = v_scales[i];
    }
    check_caches(b, i ? plan->blocks[0] : b, plan->dtype);
    b.wqkv = form.next(type, (heads + 2 * Hkv) * D, C);
    b.wo = form.next(type, C, heads * D);
    b.w13 = form.next(type, 2 * ffn, C);
    b.w2 = form.next(type, C, ffn);
    plan->blocks.push_back(std::move(b));
  }
  plan->output = form.next(type, vocabulary, C);
  const std::lock_guard<std::mutex> lock(mutex);
  Plan* p = plan.release();
  plans.insert(p);
  p->self[0] = reinterpret_cast<int64_t>(p);
  p->self[1] = p->most_rows();
  auto free = [p](void*) {
    const std::lock_guard<std::mutex> lock(mutex);
    plans.erase(p);
    delete p;
  };
  return at::from_blob(p->self, {2}, free, at::TensorOptions(at::kLong));
}

const Plan& find_plan(const Tensor& handle) {
  TORCH_CHECK_VALUE(handle.is_cpu() && handle.scalar_type() == at::kLong && handle.numel() == 2,
                    "not a handle of plan_decode");
  const auto* plan = reinterpret_cast<const Plan*>(*handle.const_data_ptr<int64_t>());
  const std::lock_guard<std::mutex> lock(mutex);
  TORCH_CHECK_VALUE(plans.count(plan), "the plan of this model is gone");
  return *plan;
}

// One number of int64 [B] for each sequence.
Tensor check_index(const Tensor& t, int64_t B, const char* name) {
  TORCH_CHECK_VALUE(t.is_cpu() && t.scalar_type() == at::kLong && t.numel() == B, name,
                    " must be int64 [B]");
  return t.contiguous();
}

// Runs tokens [B, T] at positions start[b] .., the new keys and values into the caches. Returns their
// logits [B, T, V], or [B, 1, V] of the rows `last`; or, greedily, the ids int64 [B, T] of the first of
// the largest.
Tensor run(const Tensor& handle, const Tensor& tokens, const Tensor& embedding, const Tensor& start,
           OptTensor last, bool greedy) {
  const Plan& plan = find_plan(handle);
  const int64_t V = plan.output.c.a.n;
  check_cpu(embedding, "the embedding");
  TORCH_CHECK_VALUE(embedding.dim() == 2 && embedding.size(0) == V && embedding.size(1) == plan.C &&
                        embedding.scalar_type() == plan.dtype && embedding.is_contiguous(),
                    "the embedding must be [", V, ", ", plan.C, "] in the model's dtype");
  TORCH_CHECK_VALUE(tokens.is_cpu() && tokens.dim() == 2 && tokens.scalar_type() == at::kLong,
                    "tokens must be int64 [B, T]");
  const int64_t B = tokens.size(0), T = tokens.size(1), M = B * T;
  TORCH_CHECK_VALUE(M >= 1 && M <= plan.self[1] && B == plan.blocks[0].k_cache.size(0),
                    "decode takes 1 to ", plan.self[1], " tokens of as many sequences as the caches, "
                    "not ", tokens.sizes());
  const Tensor starts = check_index(start, B, "start"), ids = tokens.contiguous();
  const Tensor rows = last ? check_index(*last, B, "last") : Tensor();
  for (int64_t b = 0; last && b < B; b++) {
    const int64_t r = rows.const_data_ptr<int64_t>()[b];
    TORCH_CHECK_INDEX(r >= 0 && r < T, "last: row ", r, " of ", T);
  }

  const int threads = at::get_num_threads();
  Tensor logits;
  if (!greedy) logits = at::empty({B, last ? 1 : T, V}, embedding.options());
  Step s{plan, type_of(embedding), embedding.element_size(), B, T, M, plan.group_bytes(M)};
  s.last = last ? rows.const_data_ptr<int64_t>() : nullptr;
  Pieces& p = s.attention = Pieces{B, T, plan.H, plan.Hkv, plan.D, plan.S, s.type};
  p.cache_scales(plan.blocks[0].k_scale, plan.blocks[0].v_scale);
  p.first = starts.const_data_ptr<int64_t>();
  p.y_stride[0] = T * plan.H * plan.D;
  p.y_stride[1] = plan.D;
  p.y_stride[2] = plan.H * plan.D;
  p.softmax_scale = 1.0f / std::sqrt(float(plan.D));

  char** places[] = {&s.x, &s.qkv, &s.heads, &s.projected, &s.middle, &s.gate_up, &s.hidden};
  const int64_t C = plan.C, wide = plan.H * plan.D, kv = 2 * plan.Hkv * plan.D;
  const int64_t sizes[] = {C, wide + kv, wide, C, C, 2 * plan.F, plan.F};
  const int64_t groups = std::max<int64_t>(threads, div_up(M, kFewRows));
  int64_t bytes = p.plan(threads) + groups * s.group_bytes;
  for (int64_t n : sizes) bytes += Scratch::round_up(M * n * s.size);
  if (greedy) bytes += Scratch::round_up(M * V * s.size);
  Scratch scratch(bytes);
  p.take(scratch, threads);
  for (int i = 0; i < 7; i++) *places[i] = scratch.take<char>(M * sizes[i] * s.size);
  s.groups = scratch.take<char>(groups * s.group_bytes);
  std::vector<Coded> forms(groups);
  s.forms = forms.data();
  s.logits = greedy ? scratch.take<char>(M * V * s.size)
                    : static_cast<char*>(logits.mutable_data_ptr());
  p.y = s.heads;
  Meeting meeting;
  s.meeting = &meeting;
  std::vector<int64_t> best(greedy ? threads * M : 0, -1);
  s.best = greedy ? best.data() : nullptr;
  for (int64_t m = 0; m < M; m++) {
    const int64_t id = ids.const_data_ptr<int64_t>()[m];
    TORCH_CHECK_INDEX(id >= 0 && id < V, "token ", id, " is outside the vocabulary of ", V);
    memcpy(s.x + m * C * s.size,
           static_cast<const char*>(embedding.const_data_ptr()) + id * C * s.size, C * s.size);
  }
#pragma omp parallel num_threads(threads)
  {
    const int rank = omp_get_thread_num(), count = omp_get_num_threads();
    for (size_t i = 0; i < plan.blocks.size(); i++) {
      const Block* next = i + 1 < plan.blocks.size() ? &plan.blocks[i + 1] : nullptr;
      s.run(plan.blocks[i], next ? next->norm1 : plan.norm, next ? next->wqkv : plan.output, rank,
            count);
    }
    s.head(rank, count);
  }
  if (!greedy) return logits;
  Tensor chosen = at::empty({B, T}, tokens.options());
  for (int64_t r = 0; r < M; r++) chosen.mutable_data_ptr<int64_t>()[r] = s.choose(r, threads);
  return chosen;
}

Tensor decode(const Tensor& handle, const Tensor& tokens, const Tensor& embedding,
              const Tensor& start, OptTensor last) {
  return run(handle, tokens, embedding, start, last, false);
}

Tensor decode_greedy(const Tensor& handle, const Tensor& tokens, const Tensor& embedding,
                     const Tensor& start) {
  return run(handle, tokens, embedding, start, std::nullopt, true);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flatllama, m) {
  m.def("plan_decode(Tensor[] norms, Tensor[] head_norms, float eps, Tensor cos, Tensor sin, "
        "Tensor[] k_caches, Tensor[] v_caches, Tensor[] k_scales, Tensor[] v_scales, int heads, "
        "int ffn, int vocabulary, Tensor?[] tensors, int[] forms) -> Tensor");
  // The handle stands for the caches, which the call writes.
  m.def("decode(Tensor(a!) handle, Tensor tokens, Tensor embedding, Tensor start, Tensor? last) "
        "-> Tensor");
  m.def("decode_greedy(Tensor(a!) handle, Tensor tokens, Tensor embedding, Tensor start) -> Tensor");
}

TORCH_LIBRARY_IMPL(flatllama, CPU, m) {
  m.impl("plan_decode", plan_decode);
  m.impl("decode", decode);
  m.impl("decode_greedy", decode_greedy);
}
