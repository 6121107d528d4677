// CPU kernels of the ROC ops: radix sort passes and the sums over a chunk of two sorted arrays.
#pragma once

#include <cstdint>

#include "common/exact_sums.h"
#include "cpu/capability.h"

namespace oodk {

// Digits of the sort, by the bytes of a key: three passes for 32 bits, six for 64.
constexpr int radix_bits(int width) {
  return width == 2 ? 8 : 11;
}
constexpr int radix_digits(int width) {
  return (8 * width + radix_bits(width) - 1) / radix_bits(width);
}
constexpr int kRadix = 1 << radix_bits(8); // places for the values of one digit

// Scores of a chunk: few enough that the sums over it are exact in float64.
constexpr int64_t kRocChunk = 8192;

// `width` is the bytes of a score or key; all work on [begin, end).
struct RocKernels {
  // Keys of scores `stride` scores apart. counts[digit][value] += occurrences, for every digit.
  void (*make_keys)(const void* scores, int64_t stride, int width, int64_t inf_bits, int64_t begin,
      int64_t end, void* keys, int64_t* counts);
  // counts[value] += occurrences in one digit.
  void (*count)(
      const void* keys, int width, int digit, int64_t begin, int64_t end, int64_t* counts);
  // Moves keys to `out`, aligned to 64 bytes, each to the next place of its digit.
  void (*scatter)(const void* keys, int width, int digit, int64_t begin, int64_t end,
      int64_t* places, void* out);
  // Sums over the levels between two points with at most kRocChunk scores.
  void (*sums)(const void* id, int64_t n, const void* ood, int64_t m, int width, RocPoint begin,
      RocPoint end, RocSums* sums);
};

OODK_DECLARE_KERNELS(RocKernels, roc_kernels)

} // namespace oodk
