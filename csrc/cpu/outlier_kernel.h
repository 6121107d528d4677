// The kernels of outlier_cross_entropy of one instruction set: raw pointers in, raw pointers out,
// one thread.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/capability.h"

namespace oodk {

struct OutlierRows {
  const void* logits; // (rows, width), `stride` values from row to row
  DType dtype;
  int64_t width, stride;
  const int64_t* target; // (rows,): 0..width - 1, or -1
};

struct OutlierWeights {
  double id, ood; // of a row
  bool absent; // the target of OOD rows is the last column, which counts as OOD too
};

// Each works on the rows [begin, end). T is double for float64 logits, else float.
struct OutlierKernels {
  void (*forward)(const OutlierRows&, int64_t begin, int64_t end, void* loss /* T (rows,) */,
      void* logsumexp /* T (rows,) */, void* stats /* T (rows, 2) */);
  void (*backward)(const OutlierRows&, int64_t begin, int64_t end, const void* grad_loss,
      const void* grad_logsumexp, const void* stats, void* grad_logits /* contiguous */);
  void (*loss_and_gradient)(const OutlierRows&, int64_t begin, int64_t end, const OutlierWeights&,
      void* loss /* T (rows,), weighted */, void* grad_logits);
};

OODK_DECLARE_KERNELS(OutlierKernels, outlier_kernels)

} // namespace oodk
