// What the CPU and the CUDA backend of the ROC ops share: the sums over levels (distinct keys) of
// two sorted key arrays, and how they are cut into chunks of whole levels. Keys ascend; a point
// (i, j) is the i ID and the j OOD scores below a level.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace oodk {

using uint128 = unsigned __int128;
using int128 = __int128;

struct RocPoint {
  int64_t i, j;
};

struct RocSums {
  uint128 wins; // sum over ID scores of P = 2 #{ood below} + #{ood equal}
  uint128 ties;
  uint128 id_squares; // sum over ID scores of P^2
  uint128 ood_squares; // sum over OOD scores of Q^2, Q = 2 #{id above} + #{id equal}
  int128 separation; // max of j n - i m over points: n m (TPR - FPR)
  // Sums over positives of the precision at their level (average precision), and of its mean with
  // the precision one level before (trapezoid): ID, OOD positive.
  double area[4];
};

constexpr int kRocCounts = 5, kRocAreas = 4;

// In an unnamed namespace, as simd.h is: this is compiled once per instruction set.
namespace {

// Precision of "ID at or above this point" and of "OOD below it", 1 where that is nothing.
OODK_HOST_DEVICE inline double precision_in(RocPoint p, int64_t n, int64_t m) {
  const double above = double(n - p.i), all = above + double(m - p.j);
  return all > 0 ? above / all : 1;
}
OODK_HOST_DEVICE inline double precision_out(RocPoint p) {
  const double below = double(p.j), all = below + double(p.i);
  return all > 0 ? below / all : 1;
}

// The level between two adjacent points.
OODK_HOST_DEVICE inline void add_level(
    RocSums& sums, RocPoint from, RocPoint to, int64_t n, int64_t m) {
  const int64_t a = to.i - from.i, b = to.j - from.j;
  const uint128 p = uint128(2 * from.j + b), q = uint128(2 * (n - to.i) + a);
  sums.wins += a * p;
  sums.ties += uint128(a) * b;
  sums.id_squares += a * p * p;
  sums.ood_squares += b * q * q;
  const int128 separation = int128(to.j) * n - int128(to.i) * m;
  sums.separation = separation > sums.separation ? separation : sums.separation;
  const double in = precision_in(from, n, m), in_above = precision_in(to, n, m);
  const double out = precision_out(to), out_below = precision_out(from);
  sums.area[0] += a * in;
  sums.area[1] += b * out;
  sums.area[2] += a * (0.5 * (in + in_above));
  sums.area[3] += b * (0.5 * (out + out_below));
}

OODK_HOST_DEVICE inline void add_sums(RocSums& sums, const RocSums& more) {
  sums.wins += more.wins;
  sums.ties += more.ties;
  sums.id_squares += more.id_squares;
  sums.ood_squares += more.ood_squares;
  sums.separation = more.separation > sums.separation ? more.separation : sums.separation;
  for (int k = 0; k < kRocAreas; ++k)
    sums.area[k] += more.area[k];
}

// Sums of many chunks, in the order they come, with Neumaier's compensation.
struct RocTotal {
  RocSums sums;
  double lost[kRocAreas];

  OODK_HOST_DEVICE void add(const RocSums& chunk) {
    for (int k = 0; k < kRocAreas; ++k) {
      const double before = sums.area[k], more = chunk.area[k], after = before + more;
      lost[k] += before >= more ? (before - after) + more : (more - after) + before;
    }
    add_sums(sums, chunk);
  }
  OODK_HOST_DEVICE RocSums value() const {
    RocSums total = sums;
    for (int k = 0; k < kRocAreas; ++k)
      total.area[k] += lost[k];
    return total;
  }
};

// First index of keys[0, n) whose key is not below (`equal` false) or above (true) `key`.
template <typename K>
OODK_HOST_DEVICE inline int64_t bound(const K* keys, int64_t n, K key, bool equal) {
  int64_t low = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    const bool right = equal ? keys[low + half] <= key : keys[low + half] < key;
    low = right ? low + half + 1 : low;
    n = right ? n - half - 1 : half;
  }
  return low;
}

// How many of the d least keys are IDs; of equal keys, IDs come first.
template <typename K>
OODK_HOST_DEVICE inline int64_t merge_path(
    const K* id, int64_t n, const K* ood, int64_t m, int64_t d) {
  int64_t low = d > m ? d - m : 0, high = d < n ? d : n;
  while (low < high) {
    const int64_t i = low + (high - low) / 2;
    if (id[i] <= ood[d - 1 - i])
      low = i + 1;
    else
      high = i;
  }
  return low;
}

// Both ends of the level that holds the d-th of all scores in ascending order.
struct RocCut {
  RocPoint low, high;
};

template <typename K>
OODK_HOST_DEVICE inline RocCut cut_at(const K* id, int64_t n, const K* ood, int64_t m, int64_t d) {
  if (d >= n + m)
    return {{n, m}, {n, m}};
  const int64_t i = merge_path(id, n, ood, m, d), j = d - i;
  const K key = j >= m || (i < n && id[i] <= ood[j]) ? id[i] : ood[j];
  return {{bound(id, i, key, false), bound(ood, j, key, false)},
      {i + bound(id + i, n - i, key, true), j + bound(ood + j, m - j, key, true)}};
}

// Chunk c of `size` scores owns the levels that begin in it: all of [begin, end), and the level
// [end, after), which may reach beyond the chunk.
struct RocChunk {
  RocPoint begin, end, after;
};

template <typename K>
OODK_HOST_DEVICE inline RocChunk chunk_at(
    const K* id, int64_t n, const K* ood, int64_t m, int64_t c, int64_t size) {
  const auto begins_at = [](const RocCut& cut, int64_t d) { return cut.low.i + cut.low.j == d; };
  const int64_t d = c * size, next = d + size < n + m ? d + size : n + m;
  const RocCut first = cut_at(id, n, ood, m, d), last = cut_at(id, n, ood, m, next);
  const RocPoint begin = begins_at(first, d) ? first.low : first.high;
  const int64_t i = last.low.i - begin.i, j = last.low.j - begin.j;
  if (i < 0 || j < 0 || i + j > size) // inside a level that began before; or keys are not sorted
    return {begin, begin, begin};
  return {begin, last.low, begins_at(last, next) ? last.low : last.high};
}

// counts (kRocCounts, 2) and areas (kRocAreas,) as the op returns them.
OODK_HOST_DEVICE inline void write_sums(
    const RocSums& sums, int64_t n, int64_t m, int64_t* counts, double* areas) {
  const uint128 values[kRocCounts] = {
      sums.wins, sums.ties, sums.id_squares, sums.ood_squares, uint128(sums.separation)};
  for (int k = 0; k < kRocCounts; ++k) {
    counts[2 * k] = int64_t(values[k] >> 62);
    counts[2 * k + 1] = int64_t(values[k]) & ((int64_t(1) << 62) - 1);
  }
  for (int k = 0; k < kRocAreas; ++k)
    areas[k] = sums.area[k] / double(k % 2 ? m : n);
}

} // namespace
} // namespace oodk
