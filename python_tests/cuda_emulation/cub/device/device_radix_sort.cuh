// Stands in for CUB where bindings run without a GPU: sorts nothing, notes the stream.
#pragma once

#include "cuda_emulation.h"

namespace cub {

template <typename Key>
class DoubleBuffer {
 public:
  DoubleBuffer(Key* current, Key*) : current_(current) {}
  Key* Current() const {
    return current_;
  }

 private:
  Key* current_;
};

struct DeviceRadixSort {
  // As the real one: without memory it says how much it wants.
  template <typename Key>
  static cudaError_t SortKeys(
      void* memory, size_t& bytes, DoubleBuffer<Key>&, int64_t n, int, int, cudaStream_t stream) {
    if (!memory)
      bytes = size_t(n) / 16 + 1;
    else
      emulation::launches.push_back({0, {1, 1, 1}, {32, 1, 1}, 0, stream, emulation::device});
    return cudaSuccess;
  }
};

} // namespace cub
