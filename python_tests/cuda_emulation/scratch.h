// Scratch memory of a call: each array by itself, for AddressSanitizer to guard, and filled with
// `poison`.
#pragma once

#include <list>

#include "cuda/launches.cuh"
#include "runner.h"

namespace runner {

class GuardedScratch : public oodk::cuda::Scratch {
 public:
  void release() override {
    arrays_.clear();
  }

 private:
  void* bytes(size_t size) override {
    const Array& array = arrays_.emplace_back(size);
    array.written();
    std::memset(array.data(), emulation::poison, size);
    return array.data();
  }
  std::list<Array> arrays_;
};

} // namespace runner
