// dL/dz of a softmax from its saved statistics: for each instruction set, as simd.h is.
#pragma once

#include "cpu/simd.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

// to = scale e^(z - m) + bias for n adjacent columns, with `room` >= n columns left in the row.
// Whole vectors may spill into the columns that follow, which are written after it.
template <typename S, typename T = acc_t<S>>
OODK_INLINE void scaled_softmax(const S* z, int64_t n, int64_t room, T m, T scale, T bias, S* to) {
  constexpr int L = lanes<T>;
  const vec<T> shifted = splat(m), factor = splat(scale), more = splat(bias);
  int64_t i = 0;
  for (; i < n && i + L <= room; i += L)
    store(to + i, exp(load(z + i) - shifted) * factor + more);
  if (i < n)
    store_first(
        to + i, int(n - i), exp(load_first(z + i, int(n - i), m) - shifted) * factor + more);
}

// Adds `onehot` to column `at`, which holds scale e^(z - m): once more from its logit where the
// stored value is rounded to half precision.
template <typename S, typename T = acc_t<S>>
OODK_INLINE void add_onehot(const S* z, T m, T scale, T onehot, S* at) {
  if constexpr (sizeof(S) == sizeof(T))
    *at += onehot;
  else
    narrow(scale * std::exp(widen(*z) - m) + onehot, at);
}

} // namespace
} // namespace OODK_CPU_NS
} // namespace oodk
