// Two look-ups and an atomic integer increment a score. Lanes of a warp that hit the same counter
// add once, so that ties, which a score at its ceiling brings by the million, do not queue up at
// one address. Traffic: the scores once; table and counters mostly stay in L2.
#pragma once

#include "histogram_key.h"

namespace oodk {

// Bits of a half-precision score as those of the float32 it equals.
struct BFloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

OODK_HOST_DEVICE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
OODK_HOST_DEVICE float as_float(float x, bool&) { return x; }
OODK_HOST_DEVICE float as_float(double x, bool& rounded) {
  const float y = float(x);
  rounded = double(y) != x;
  return y;
}
OODK_HOST_DEVICE float as_float(BFloat16Bits x, bool&) {
  return float_of_bits(uint32_t(x.bits) << 16);
}
OODK_HOST_DEVICE float as_float(HalfBits x, bool&) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const float number = float_of_bits(magnitude) * 0x1p112f; // right for subnormals too
  const bool special = magnitude >= 0x0f800000;             // inf or NaN
  return float_of_bits((special ? magnitude | 0x7f800000 : float_bits(number)) | sign);
}

template <typename S>
struct HistogramLaunch {
  const S* scores;
  const uint8_t* rows; // added to row, or null
  int64_t n, row, n_rows;
  HistogramTable table;
  unsigned long long* counts; // (n_rows, width)
  int64_t width;
};

// A thread's part of the facts about row `row`.
struct ThreadFacts {
  unsigned scores = 0, rounded = 0, low_bits = 0;
};

// What one score does; `add(at)` increments counts[at] and is called by every lane, `at` < 0 for
// nothing to add.
template <typename S, typename Add>
OODK_HOST_DEVICE void count_score(
    const HistogramLaunch<S>& in, int64_t i, Add&& add, ThreadFacts& mine) {
  int64_t at = -1, tally = -1;
  if (i < in.n) {
    int64_t row = in.row + (in.rows ? in.rows[i] : 0);
    const bool outside = row >= in.n_rows;
    row = outside ? in.row : row;
    bool rounded = false;
    const float x = as_float(in.scores[i], rounded) + 0.0f; // -0.0 becomes 0.0
    int64_t counter = -1;
    if (x == x && !outside)
      counter = find_counter(in.table, order_key(float_bits(x)));
    const int64_t begin = row * in.width, facts = begin + in.width - kFacts;
    at = counter < 0 ? facts + kRefused : begin + counter;
    if (counter >= 0 && row == in.row)
      ++mine.scores;
    else if (counter >= 0)
      tally = facts + kScores;
    if (x == x) {
      mine.rounded += rounded;
      mine.low_bits |= float_bits(x) & 0xffff;
    }
  }
  add(at);
  if (in.rows)
    add(tally);
}

#if defined(__CUDACC__)

struct WarpAdd {
  unsigned long long* counts;

  __device__ void operator()(int64_t at) const {
    const unsigned same = __match_any_sync(0xffffffffu, (unsigned long long)at);
    const int lane = threadIdx.x % 32;
    if (at >= 0 && __ffs(same) - 1 == lane)
      atomicAdd(counts + at, (unsigned long long)__popc(same));
  }
};

template <typename S>
__global__ void __launch_bounds__(256) count_scores(HistogramLaunch<S> in) {
  ThreadFacts mine;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x;
  for (int64_t block = first; block < in.n; block += stride) // whole warps stay together
    count_score(in, block + threadIdx.x, WarpAdd{in.counts}, mine);
  for (int step = 16; step > 0; step /= 2) {
    mine.scores += __shfl_xor_sync(0xffffffffu, mine.scores, step);
    mine.rounded += __shfl_xor_sync(0xffffffffu, mine.rounded, step);
    mine.low_bits |= __shfl_xor_sync(0xffffffffu, mine.low_bits, step);
  }
  if (threadIdx.x % 32 == 0) {
    unsigned long long* facts = in.counts + (in.row + 1) * in.width - kFacts;
    atomicAdd(facts + kScores, (unsigned long long)mine.scores);
    if (mine.rounded)
      atomicAdd(facts + kRounded, (unsigned long long)mine.rounded);
    if (mine.low_bits & ~unsigned(facts[kLowBits])) // mostly there already
      atomicOr(facts + kLowBits, (unsigned long long)mine.low_bits);
  }
}

#endif

} // namespace oodk
