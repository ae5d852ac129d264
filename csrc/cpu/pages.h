// Memory on large pages, where the system has them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lbfast {

constexpr int64_t kLargePage = 2 << 20;

inline int64_t whole_pages(int64_t bytes) { return (bytes + kLargePage - 1) / kLargePage * kLargePage; }

// A thread's memory for its pieces, kept from call to call: on large pages, and never given back to be zeroed again.
class Arena {
 public:
  static Arena& mine(int64_t bytes) {
    thread_local Arena arena;
    if (arena.size_ < bytes) {
      arena.size_ = 0;  // until there is so much
      arena.data_.reset();
      arena.data_.reset(static_cast<char*>(std::aligned_alloc(kLargePage, whole_pages(bytes))));
      TORCH_CHECK(arena.data_ != nullptr, "out of memory");
      arena.size_ = whole_pages(bytes);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      madvise(arena.data_.get(), arena.size_, MADV_HUGEPAGE);
#endif
      std::memset(arena.data_.get(), 0, arena.size_);
    }
    arena.used_ = 0;
    return arena;
  }
  template <typename T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(data_.get() + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    TORCH_INTERNAL_ASSERT(used_ <= size_);
    return out;
  }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0, used_ = 0;
};

// A buffer of zeros on large pages, where the system has them: weights are read once a piece, and each of their 4 KiB
// would need the machine to look its page up.
inline at::Tensor large_pages(int64_t bytes) {
  TORCH_CHECK(bytes >= 0, "large_pages: bytes: expected 0 or more, got ", bytes);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t size = whole_pages(bytes) + kLargePage;
  void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped != MAP_FAILED) {
    char* first = reinterpret_cast<char*>(whole_pages(reinterpret_cast<intptr_t>(mapped)));
    madvise(first, size - kLargePage, MADV_HUGEPAGE);  // advice: without it, slower
    return at::from_blob(first, {bytes}, [mapped, size](void*) { munmap(mapped, size); }, at::kByte);
  }
#endif
  return at::zeros({bytes}, at::kByte);
}

}  // namespace lbfast
