// The kernel of GEN's scores of one instruction set: raw pointers in and out, one thread.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/capability.h"

namespace oodk {

struct GenKernels {
  // Rows [begin, end) of logits (rows, width), `stride` values apart; `count` settings, 1 <= m <=
  // width; scores (rows, count), double for float64 logits, else float.
  void (*scores)(const void* logits, DType dtype, int64_t width, int64_t stride,
      const double* gamma, const int64_t* m, int64_t count, int64_t begin, int64_t end,
      void* scores);
};

OODK_DECLARE_KERNELS(GenKernels, gen_kernels)

} // namespace oodk
