// From a score to its counter; shared by the CPU and the CUDA kernel, without a torch header.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/order_key.h"

namespace oodk {

// What follows a row's counters: facts about the scores that went into it.
enum Fact : int64_t {
  kScores, // how many were counted
  kRefused, // NaN, or sent outside of counts: not counted
  kRounded, // float64 values that no float32 equals
  kLowBits, // OR of the low 16 bits of all float32 values
  kFacts
};

struct HistogramTable {
  const uint64_t* entries; // (65536,)
  const int32_t* atoms; // (n_atoms,) keys, ascending
  int64_t bins, n_atoms;
};

namespace {

// Where the counters of one prefix, the high 16 bits of a score's key, are. As in the table:
// bits 0-4 shift, 5-31 start, 32-55 first atom, 56-62 number of atoms.
struct HistogramEntry {
  uint64_t packed;

  OODK_HOST_DEVICE uint32_t shift() const {
    return packed & 31;
  }
  OODK_HOST_DEVICE uint32_t start() const {
    return uint32_t(packed) >> 5;
  }
  OODK_HOST_DEVICE uint32_t first_atom() const {
    return (packed >> 32) & 0xffffff;
  }
  OODK_HOST_DEVICE uint32_t n_atoms() const {
    return (packed >> 56) & 127;
  }
};

// The counter of a key, or -1 where the table points outside of the row.
OODK_HOST_DEVICE inline int64_t find_counter(const HistogramTable& table, int32_t key) {
  const HistogramEntry entry{table.entries[uint16_t(key >> 16) ^ 0x8000]};
  if (const uint32_t n = entry.n_atoms()) {
    uint32_t first = entry.first_atom(), last = first + n;
    if (last <= table.n_atoms) {
      while (first < last) {
        const uint32_t middle = (first + last) / 2;
        const int32_t atom = table.atoms[middle];
        if (atom == key)
          return table.bins + middle;
        if (atom < key)
          first = middle + 1;
        else
          last = middle;
      }
    }
  }
  const uint32_t bin = entry.start() + ((uint32_t(key) & 0xffff) >> entry.shift());
  return bin < table.bins ? int64_t(bin) : -1;
}

} // namespace

} // namespace oodk
