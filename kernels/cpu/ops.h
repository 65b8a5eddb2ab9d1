// What the files of operators share.
#pragma once
#include <ATen/core/Tensor.h>

#include "kernels.h"

const Kernels& kernels();  // the level in use

inline Type type_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::fp32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::fp16;
    default: TORCH_CHECK_TYPE(false, "expected fp32, bf16 or fp16, not ", t.scalar_type());
  }
}

inline void check_cpu(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU");
}

// Memory that a call needs while it runs. Up to some megabytes this thread keeps it, since new pages
// would cost more than some calls do; so there is one Scratch at a time. Beyond, it is a tensor's.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  // The next `count` numbers, on a 64-byte line of their own.
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += round_up(count * int64_t(sizeof(T)));
    return p;
  }
  static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  at::Tensor large_;
  char* next_;
};
