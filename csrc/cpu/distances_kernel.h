// The kernel of distances to named rows, of one instruction set: raw pointers in, raw pointers out,
// one thread.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/capability.h"

namespace oodk {

struct DistanceKernels {
  // Rows [begin, end) of x (rows, width), `stride` values apart, and those of `table`, whose rows are
  // `table_stride` apart, that index (rows, count) names. inner, l1 and l2 are (rows, count); table
  // and outputs are double for float64 rows, else float.
  void (*distances)(const void* x, DType dtype, int64_t width, int64_t stride, const void* table,
      int64_t table_stride, const int64_t* index, int64_t count, int64_t begin, int64_t end,
      void* inner, void* l1, void* l2);
};

OODK_DECLARE_KERNELS(DistanceKernels, distance_kernels)

} // namespace oodk
