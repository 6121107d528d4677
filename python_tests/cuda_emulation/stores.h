// What a block has written to memory that others can see, and not handed over.
//
// CUDA promises that other blocks see it only after a fence, or the end of the launch. So while
// several blocks are alive, what one has written is taken back when another goes on, and put there
// again before it goes on itself. Bytes, so that neighbours do not disturb each other. Memory is what
// the runner has made known, as long as that is little.
#pragma once

#include <cstring>
#include <map>

#include "fibres.h"

namespace emulation {

inline bool interleaved = false; // blocks of this launch
inline std::minstd_rand pauses; // at which atomics a thread pauses

class Stores {
 public:
  static inline std::map<char*, size_t> memory; // bytes from there
  static constexpr size_t kMost = 64 << 10; // bytes in all

  // The block goes on: memory is as all see it.
  void resume() {
    seen_.clear();
    size_t bytes = 0;
    for (const auto& [at, size] : memory)
      bytes += size;
    if (bytes > kMost)
      return;
    for (const auto& [at, size] : memory)
      seen_[at].assign(at, at + size);
    for (const auto& [at, value] : own_)
      *at = value;
  }
  // Another goes on. `ended`: what this one has written is there to stay.
  void suspend(bool ended) {
    own_.clear();
    for (const auto& [at, before] : seen_)
      for (size_t i = 0; i < before.size() && !ended; ++i)
        if (at[i] != before[i]) {
          own_.emplace_back(at + i, at[i]);
          at[i] = before[i];
        }
    seen_.clear();
  }

  // What the running block has written so far is for all to see.
  static void publish() {
    for (auto& [at, before] : seen_)
      std::memcpy(before.data(), at, before.size());
  }
  static void publish(const void* from, size_t bytes) {
    const char* const first = static_cast<const char*>(from);
    for (auto& [at, before] : seen_)
      if (first >= at && first + bytes <= at + before.size())
        std::memcpy(before.data() + (first - at), first, bytes);
  }

 private:
  static inline std::map<char*, std::vector<char>>
      seen_; // memory without what the block has written
  std::vector<std::pair<char*, char>> own_;
};

} // namespace emulation
