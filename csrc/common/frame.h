// Where K-means solves a problem whose points are not normalised: at x * unit - center. Shared by all
// backends.
#pragma once

#include <limits>

#include "common/host_device.h"

namespace oodk {

// A negative scale of a row stands for its magnitude times this, exactly: the inverse of a subnormal
// norm is more than the largest number.
template <typename T>
constexpr T kBoost = T(0x1p64);

namespace {

// A power of two that leaves room for sums of some products of sums of two rows, where the largest
// squared norm is so near the largest number that there is none.
template <typename T>
OODK_HOST_DEVICE inline T frame_unit(T largest) {
  constexpr T room = T(0x1p-8);
  return largest > std::numeric_limits<T>::max() * room * room ? room : T(1);
}

// Whether the mean becomes the center: where it is farther from 0 than the points are from it, on
// average, for then the products of points drown their distances. Else a shift gains nothing.
OODK_HOST_DEVICE inline bool is_far(double norm2_of_mean, double variance) {
  return norm2_of_mean > variance;
}

} // namespace
} // namespace oodk
