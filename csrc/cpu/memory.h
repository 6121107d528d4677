#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace oodk {

// Asks for huge pages under a large output that is about to be written for the first time: with
// 4 KiB pages its page faults cost more than writing it.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20; // bytes of a huge page
  const uintptr_t begin = (uintptr_t(data) + page - 1) / page * page;
  const uintptr_t end = (uintptr_t(data) + bytes) / page * page;
  if (end > begin)
    madvise((void*)begin, end - begin, MADV_HUGEPAGE); // advice: failing is no error
#endif
}

// Uninitialised values, aligned for vectors.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t n) : data_((T*)operator new[](n * sizeof(T), kAlign)) {
    advise_huge_pages(data_.get(), n * sizeof(T));
  }
  operator T*() const {
    return data_.get();
  }
  T* get() const {
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* data) const {
      operator delete[](data, kAlign);
    }
  };
  std::unique_ptr<T, Free> data_;
};

} // namespace oodk
