// The feature kernels of one instruction set: raw pointers in, raw pointers out, one thread.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/capability.h"

namespace oodk {

struct FeatureKernels {
  // Rows [begin, end) of features (rows, width), `stride` values apart, `count` percentiles of each,
  // in 0..100 and `step` apart. l1, l2 and sum are (rows,), threshold and top_sum (rows, count);
  // double for float64 features, else float.
  void (*stats)(const void* features, DType dtype, int64_t width, int64_t stride, bool rectified,
      const double* percentiles, int64_t count, int64_t step, int64_t begin, int64_t end, void* l1,
      void* l2, void* sum, void* threshold, void* top_sum);
};

OODK_DECLARE_KERNELS(FeatureKernels, feature_kernels)

} // namespace oodk
