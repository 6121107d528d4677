// The MOS kernels of one instruction set: raw pointers in, raw pointers out, one thread.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "dtype.h"

namespace oodk {

struct MosRows {
  const void* logits; // (rows, width), `stride` values from row to row
  DType dtype;
  int64_t rows, width, stride;
  const int64_t* offsets; // (groups + 1,), valid
  int64_t groups;
};

// Each works on the rows [begin, end). T is double for float64 logits, else float.
struct MosKernels {
  void (*score)(const MosRows&, int64_t begin, int64_t end, void* score /* T (rows,) */);
  void (*predict)(const MosRows&, int64_t begin, int64_t end, void* score, void* log_odds,
      int64_t* label, int64_t* group, void* prob /* T (rows,) */);
  void (*log_others)(const MosRows&, int64_t begin, int64_t end,
      void* log_others /* T (rows, groups) */, void* stats /* T (rows, groups, 2) */);
  // `column` (rows,): the target's column, or -1 to ignore the row; `group` (rows,): its group.
  void (*loss)(const MosRows&, int64_t begin, int64_t end, const int64_t* column,
      const int64_t* group, void* loss /* T (rows,) */, void* stats);
  void (*log_others_backward)(const MosRows&, int64_t begin, int64_t end,
      const void* grad /* T (rows, groups) */, const void* stats,
      void* grad_logits /* as logits, contiguous */);
  void (*loss_backward)(const MosRows&, int64_t begin, int64_t end, const int64_t* column,
      const int64_t* group, const void* grad /* T (rows,) */, const void* stats,
      void* grad_logits);
};

OODK_DECLARE_KERNELS(MosKernels, mos_kernels)

} // namespace oodk
