// The feature-shaping kernel of one instruction set: raw pointers, one thread.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/shape.h"
#include "cpu/capability.h"

namespace oodk {

struct ShapeKernels {
  // Rows [begin, end) of features (rows, width), `stride` values apart, in place. k: how many ASH
  // and SCALE keep, or the number of OptFS' bins, whose edges are low and whose factors are high; low
  // and high, double for float64 features, else float: else a limit each, the next feature's `step`
  // values on.
  void (*shape)(void* features, DType dtype, int64_t width, int64_t stride, Shape shape, int64_t k,
      const void* low, int64_t low_step, const void* high, int64_t high_step, int64_t begin,
      int64_t end);
};

OODK_DECLARE_KERNELS(ShapeKernels, shape_kernels)

} // namespace oodk
