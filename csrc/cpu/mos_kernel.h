// The MOS kernels of one instruction set: raw pointers in, raw pointers out, one thread.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/capability.h"

namespace oodk {

struct MosRows {
  const void* logits; // (rows, width), `stride` values from row to row
  DType dtype;
  int64_t rows, width, stride;
  const int64_t* offsets; // (groups + 1,), valid
  int64_t groups;
};

struct MosTarget {
  const int64_t* label; // (rows,): class indices 0..classes-1, or ignore_index
  const int64_t* group_of; // (classes,)
  int64_t ignore_index;

  bool ignored(int64_t row) const {
    return label[row] == ignore_index;
  }
  int64_t group(int64_t row) const {
    return group_of[label[row]];
  }
  int64_t column(int64_t row) const { // the others of groups 0..k come before it
    return label[row] + group(row) + 1;
  }
};

// Each works on the rows [begin, end). T is double for float64 logits, else float.
struct MosKernels {
  void (*score)(const MosRows&, int64_t begin, int64_t end, void* score /* T (rows,) */);
  void (*predict)(const MosRows&, int64_t begin, int64_t end, void* score, void* log_odds,
      int64_t* label, int64_t* group, void* prob /* T (rows,) */);
  void (*log_others)(const MosRows&, int64_t begin, int64_t end,
      void* log_others /* T (rows, groups) */, void* stats /* T (rows, groups, 2) */);
  void (*loss)(const MosRows&, int64_t begin, int64_t end, const MosTarget&,
      void* loss /* T (rows,) */, void* stats);
  void (*log_others_backward)(const MosRows&, int64_t begin, int64_t end,
      const void* grad /* T (rows, groups) */, const void* stats,
      void* grad_logits /* as logits, contiguous */);
  void (*loss_backward)(const MosRows&, int64_t begin, int64_t end, const MosTarget&,
      const void* grad /* T (rows,) */, const void* stats, void* grad_logits);
};

OODK_DECLARE_KERNELS(MosKernels, mos_kernels)

} // namespace oodk
