// Scratch memory: one block per thread, kept between calls while it is small.
#pragma once
#include <cstdlib>
#include <new>

#include "simd.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes) ((void)(from), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(from, bytes) ((void)(from), (void)(bytes))
#endif

namespace {

// Under AddressSanitizer, forbidden bytes behind every array of an arena: they share one allocation otherwise.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kForbidden = 256;
#else
constexpr int64_t kForbidden = 0;
#endif

// Hands out 64-byte aligned arrays from a block; constructed with a null block it only adds up what would be needed.
class Arena {
 public:
  explicit Arena(char* block) : block_(block) {}
  template <class T>
  T* take(int64_t count) {
    T* p = block_ ? reinterpret_cast<T*>(block_ + used_) : nullptr;
    used_ += (count * (int64_t)sizeof(T) + 127) / 64 * 64;  // at least a vector of slack for reads past the end
    if (block_) ASAN_POISON_MEMORY_REGION(block_ + used_, kForbidden);
    used_ += kForbidden;
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

// A fresh mapping for every call would cost a page fault per 4 KiB. 16 MiB holds a head of 4,096 tokens, or the tables
// of a large model.
constexpr int64_t kKeptBytes = 16 << 20;

class ThreadBlock {
 public:
  ~ThreadBlock() { std::free(block_); }
  char* get(int64_t bytes) {
    if (bytes > size_ || !block_) {
      std::free(block_);
      block_ = static_cast<char*>(std::aligned_alloc(4096, (size_t)((bytes / 4096 + 1) * 4096)));
      size_ = block_ ? bytes : 0;
    }
    if (block_) ASAN_UNPOISON_MEMORY_REGION(block_, size_);  // each caller lays it out anew
    return block_;
  }
  void trim() {
    if (size_ <= kKeptBytes) return;
    std::free(block_);
    block_ = nullptr;
    size_ = 0;
  }

 private:
  char* block_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace
