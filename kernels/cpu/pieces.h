// Attention as pieces of work for threads, for the operators that contain it.
//
// A piece: a kv head of a batch, a chunk of tokens, a stretch of slots. Few tokens are split over
// the cache, to have work for all threads; many are split among themselves.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>

#include "ops.h"

struct Pieces {
  static constexpr int64_t kLine = 16;  // a stretch's scales fill whole lines

  int64_t B, T, H, Hkv, D, S;
  Type type;
  const char *q, *k, *v;             // q [B, H, T, D] of `type`; caches [B, Hkv, S, D]
  int64_t k_stride[3], v_stride[3];  // of batch, head, slot, in elements of `cache_size` bytes
  int64_t cache_size;
  const char *k_scale, *v_scale;     // [B, Hkv, S] of `scale_type`, or null
  Type scale_type;
  const int64_t* first;              // [B], where each batch's first new token is
  char* y;                           // of `type`
  int64_t y_stride[3];               // of batch, head, token, in elements
  float softmax_scale;

  int64_t heads, chunk, chunks, splits, stretch, rows, part_size, own_size, count;
  float *parts, *own;

  void caches(const at::Tensor& k_cache, const at::Tensor& v_cache) {
    k = static_cast<const char*>(k_cache.const_data_ptr());
    v = static_cast<const char*>(v_cache.const_data_ptr());
    cache_size = k_cache.element_size();
    for (int i = 0; i < 3; i++) k_stride[i] = k_cache.stride(i), v_stride[i] = v_cache.stride(i);
  }

  // The scales [B, Hkv, S], contiguous, of an int8 cache; undefined for another.
  void cache_scales(const at::Tensor& of_k, const at::Tensor& of_v) {
    if (!of_k.defined()) return;
    scale_type = type_of(of_k);
    k_scale = static_cast<const char*>(of_k.const_data_ptr());
    v_scale = static_cast<const char*>(of_v.const_data_ptr());
  }

  // How the work is cut for `threads`, and the bytes of scratch that it needs.
  int64_t plan(int64_t threads) {
    int64_t most = 0;
    for (int64_t b = 0; b < B; b++) {
      TORCH_CHECK_INDEX(first[b] >= 0 && first[b] + T <= S, "rows ", first[b], " to ",
                        first[b] + T - 1, " do not fit a cache of ", S, " slots");
      most = std::max(most, first[b] + T);
    }
    heads = H / Hkv;
    chunk = std::min<int64_t>(T, 64);
    chunks = (T + chunk - 1) / chunk;
    rows = heads * chunk;
    splits = chunks > 1 ? 1 : threads / std::gcd(B * Hkv, threads);  // as many for every thread
    splits = std::max<int64_t>(1, std::min(splits, most / (2 * kAttentionBlock)));
    stretch = (most + splits * kLine - 1) / (splits * kLine) * kLine;
    part_size = rows * (padded(D) + 2);
    own_size = attention_scratch(D) + rows * D + (k_scale ? 2 * stretch : 0);
    count = B * Hkv * chunks * splits;
    return Scratch::round_up(count * part_size * 4) + Scratch::round_up(threads * own_size * 4);
  }

  void take(Scratch& scratch, int64_t threads) {
    parts = scratch.take<float>(count * part_size);
    own = scratch.take<float>(threads * own_size);
  }

  // A stretch's scales in fp32, zeros after their end.
  const float* widen_scales(const char* from, int64_t at, int64_t count, float* to) const {
    const int64_t size = scale_type == Type::fp32 ? 4 : 2;
    kernels().widen_rows(from + at * size, scale_type, 1, count, stretch, false, to);
    return to;
  }

  int64_t y_index(int64_t pair, int64_t row_head, int64_t token) const {
    return pair / Hkv * y_stride[0] + (pair % Hkv * heads + row_head) * y_stride[1] +
           token * y_stride[2];
  }

  // The queries of `tokens` tokens from token t on, of sequence b and kv head h, out of q
  // [B, H, T, D] -> fp32 [heads, tokens, D].
  void read_queries(int64_t b, int64_t h, int64_t t, int64_t tokens, float* to) const {
    const int64_t size = type == Type::fp32 ? 4 : 2, n = tokens * D;
    for (int64_t g = 0; g < heads; g++)
      kernels().widen_rows(q + (((b * Hkv + h) * heads + g) * T + t) * D * size, type, 1, n, n, false,
                           to + g * n);
  }

  // Piece i, by the thread of that number. queries(b, h, t, tokens, to) as `read_queries`;
  // ready(b, h, begin, end) is called before those slots are read.
  template <class Queries, class Ready>
  void run(int64_t i, int64_t thread, Queries&& queries, Ready&& ready) const {
    float* wide = own + thread * own_size;
    const int64_t pair = i / splits / chunks, b = pair / Hkv, h = pair % Hkv, split = i % splits;
    int64_t c = i / splits % chunks;
    c = c % 2 ? chunks - 1 - c / 2 : c / 2;  // late tokens cost most: pair them with early ones
    Attention a{};
    a.tokens = std::min(chunk, T - c * chunk);
    a.rows = heads * a.tokens;
    a.first = first[b] + c * chunk;
    queries(b, h, c * chunk, a.tokens, wide);
    for (int64_t j = 0; j < a.rows * D; j++) wide[j] *= softmax_scale;
    a.q = wide;
    a.k = k + (b * k_stride[0] + h * k_stride[1]) * cache_size;
    a.v = v + (b * v_stride[0] + h * v_stride[1]) * cache_size;
    a.d = D;
    a.k_stride = k_stride[2];
    a.v_stride = v_stride[2];
    a.type = type;
    a.out = parts + i * part_size;
    a.max = a.out + a.rows * padded(D);
    a.sum = a.max + a.rows;
    a.scratch = wide + rows * D;
    const int64_t begin = split * stretch, end = std::min(begin + stretch, a.first + a.tokens);
    ready(b, h, begin, end);
    if (k_scale && begin < end) {
      float* scales = a.scratch + attention_scratch(D);
      a.k_scale = widen_scales(k_scale, pair * S + begin, end - begin, scales) - begin;
      a.v_scale = widen_scales(v_scale, pair * S + begin, end - begin, scales + stretch) - begin;
    }
    kernels().attend(a, begin, end);
    for (int64_t r = 0; splits == 1 && r < a.rows; r++)
      kernels().merge(a.out, 1, part_size, a.rows, r, D, type, y,
                      y_index(pair, r / a.tokens, c * chunk + r % a.tokens));
  }

  // With splits > 1, the result of row r, of merges() in all, out of its pieces.
  int64_t merges() const { return splits > 1 ? B * Hkv * rows : 0; }
  void merge(int64_t r) const {
    kernels().merge(parts + r / rows * splits * part_size, splits, part_size, rows, r % rows, D,
                    type, y, y_index(r / rows, r % rows / T, r % T));
  }
};
