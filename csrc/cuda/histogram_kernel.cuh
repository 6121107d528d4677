// Two look-ups and an atomic integer increment a score. Lanes of a warp that hit the same counter
// add once, so that ties, which a score at its ceiling brings by the million, do not queue up at
// one address. Traffic: the scores once; table and counters mostly stay in L2.
#pragma once

#include "common/histogram_key.h"
#include "cuda/common.cuh"

namespace oodk::cuda {

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
__device__ inline void count_score(
    const HistogramLaunch<S>& in, int64_t i, Add&& add, ThreadFacts& mine) {
  int64_t at = -1, tally = -1;
  if (i < in.n) {
    int64_t row = in.row + (in.rows ? in.rows[i] : 0);
    const bool outside = row >= in.n_rows;
    row = outside ? in.row : row;
    const acc_t<S> score = widen(in.scores[i]);
    const float x = float(score);
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
      if constexpr (std::is_same_v<S, double>)
        mine.rounded += x != score;
      mine.low_bits |= float_bits(x) & 0xffff;
    }
  }
  add(at);
  if (in.rows)
    add(tally);
}

struct WarpAdd {
  unsigned long long* counts;

  __device__ void operator()(int64_t at) const {
    const unsigned same = __match_any_sync(kAllLanes, (unsigned long long)at);
    const int lane = threadIdx.x % kWarp;
    if (at >= 0 && __ffs(same) - 1 == lane)
      atomicAdd(counts + at, (unsigned long long)__popc(same));
  }
};

constexpr int kHistogramThreads = 256; // of a block

template <typename S>
__global__ void __launch_bounds__(kHistogramThreads) count_scores(HistogramLaunch<S> in) {
  ThreadFacts mine;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x;
  for (int64_t block = first; block < in.n; block += stride) // whole warps stay together
    count_score(in, block + threadIdx.x, WarpAdd{in.counts}, mine);
  for (int step = kWarp / 2; step > 0; step /= 2) {
    mine.scores += __shfl_xor_sync(kAllLanes, mine.scores, step);
    mine.rounded += __shfl_xor_sync(kAllLanes, mine.rounded, step);
    mine.low_bits |= __shfl_xor_sync(kAllLanes, mine.low_bits, step);
  }
  if (threadIdx.x % kWarp == 0) {
    unsigned long long* facts = in.counts + (in.row + 1) * in.width - kFacts;
    atomicAdd(facts + kScores, (unsigned long long)mine.scores);
    if (mine.rounded)
      atomicAdd(facts + kRounded, (unsigned long long)mine.rounded);
    if (mine.low_bits & ~unsigned(facts[kLowBits])) // mostly there already
      atomicOr(facts + kLowBits, (unsigned long long)mine.low_bits);
  }
}

} // namespace oodk::cuda
