// How many of a row's features lie above a percentile.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace oodk {
namespace {

// n - round(n p / 100), halves to even, as the authors of ASH, SCALE and LTS count them; one at
// least. 0 where p is outside 0..100 or NaN.
OODK_HOST_DEVICE inline int64_t count_above(int64_t n, double percentile) {
  if (!(percentile >= 0 && percentile <= 100))
    return 0;
  const int64_t count = n - int64_t(rint(double(n) * percentile / 100));
  return count > 1 ? count : 1;
}

} // namespace
} // namespace oodk
