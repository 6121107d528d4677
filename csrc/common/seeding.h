// How k-means++ takes a sample where there are too many points, the same on every backend.
#pragma once

#include "common/philox.h"

namespace oodk {

// More points than the limit are represented by a stratified random sample of this size, or of two
// points a cluster: a step of k-means++ reads all points that it chooses from, so that with a million
// of them seeding would take longer than Lloyd's iteration.
constexpr int64_t kSeedingLimit = 1 << 16, kSeedingSample = 1 << 15;

OODK_HOST_DEVICE inline int64_t seeding_sample(int64_t n, int64_t k, int64_t least) {
  const int64_t wanted = n < 2 * k ? n : 2 * k;
  return wanted > least ? wanted : least;
}

// Which of n items stands for stratum j of `count`, each n / count wide. Clamped: the last stratum's
// end is n, and a draw next to 1 rounds to it.
OODK_HOST_DEVICE inline int32_t stratified(int64_t n, int64_t count, int64_t j, uint64_t bits) {
  const double at = double(n) / double(count) * (double(j) + uniform(bits));
  return int32_t(at < double(n) ? at : double(n - 1));
}

} // namespace oodk
