// Philox4x32-10 (Salmon et al., SC 2011): random numbers that are a function of (seed, counter), so
// that every backend, thread and batch position draws the same. Plain C++, for host and device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace oodk {

// What a draw is for. Part of the counter: no two purposes share a random number.
enum class Stream : uint32_t { seeding = 0, sample = 1, fill = 2 };

struct PhiloxBlock {
  uint32_t word[4];
};

OODK_HOST_DEVICE inline PhiloxBlock philox(PhiloxBlock counter, uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c[1] = uint32_t(p1);
    c[2] = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c[3] = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// 64 random bits of the counter (index, step, restart, stream); a block serves two indices.
OODK_HOST_DEVICE inline uint64_t random_bits(
    uint64_t seed, Stream stream, uint32_t restart, uint32_t step, uint32_t index) {
  const PhiloxBlock r = philox({{index / 2, step, restart, uint32_t(stream)}}, seed);
  const uint64_t even = uint64_t(r.word[1]) << 32 | r.word[0];
  const uint64_t odd = uint64_t(r.word[3]) << 32 | r.word[2];
  return index % 2 ? odd : even;
}

// Uniform in [0, 1), a multiple of 2^-53.
OODK_HOST_DEVICE inline double uniform(uint64_t bits) {
  return double(bits >> 11) * 0x1p-53;
}

} // namespace oodk
