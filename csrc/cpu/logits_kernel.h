// The logit-score kernels of one instruction set: raw pointers in, raw pointers out, one thread.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/capability.h"

namespace oodk {

struct LogitKernels {
  // Rows [begin, end) of logits (rows, width), `stride` values apart; outputs (rows,), double for
  // float64 logits, else float.
  void (*scores)(const void* logits, DType dtype, int64_t width, int64_t stride, double temperature,
      int64_t begin, int64_t end, void* msp, void* max_logit, void* energy, void* entropy,
      int64_t* label);
};

OODK_DECLARE_KERNELS(LogitKernels, logit_kernels)

} // namespace oodk
