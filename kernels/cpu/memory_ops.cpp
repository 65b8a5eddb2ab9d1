// Memory: what calls use while they run; and weights and caches on huge pages, one layer after another,
// since a decode step streams through all of them, and pages of 4 KiB would cost it an address
// translation for every 64 cache lines.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <mutex>

#include "ops.h"

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

constexpr int64_t kPage = 2 << 20, kPoolBytes = 64 << 20;

// A stretch of address space that tensors share; given back when the last of them is gone.
struct Pool {
  int64_t size, used = 0;
  char *mapped, *begin;

  explicit Pool(int64_t bytes) : size((bytes + kPage - 1) / kPage * kPage) {
    void* p = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(p != MAP_FAILED, "no memory for ", size, " bytes of weights");
    mapped = static_cast<char*>(p);
    begin = mapped + (kPage - reinterpret_cast<int64_t>(p) % kPage) % kPage;
#ifdef MADV_HUGEPAGE
    madvise(begin, size, MADV_HUGEPAGE);  // a wish: without it the pages are small
#endif
  }
  ~Pool() { munmap(mapped, size + kPage); }
};

// A copy of the tensor, behind the one that was made before it.
at::Tensor on_huge_pages(const at::Tensor& t) {
  check_cpu(t, "the tensor");
  static std::mutex mutex;
  static std::weak_ptr<Pool> last;
  const int64_t bytes = Scratch::round_up(t.numel() * t.element_size());
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Pool> pool = last.lock();
  if (!pool || pool->used + bytes > pool->size) {
    pool = std::make_shared<Pool>(std::max(bytes, kPoolBytes));
    last = pool;
  }
  char* p = pool->begin + pool->used;
  pool->used += bytes;
  at::Tensor out = at::from_blob(p, t.sizes(), [pool](void*) {}, t.options());
  return out.copy_(t);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flatllama, m) { m.def("on_huge_pages(Tensor t) -> Tensor"); }

TORCH_LIBRARY_IMPL(flatllama, CPU, m) { m.impl("on_huge_pages", on_huge_pages); }
