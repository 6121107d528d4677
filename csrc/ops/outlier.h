// Contract of outlier_cross_entropy (schema: library.cpp), shared by the CPU and the CUDA backend.
//
// The contents of target are checked on the CPU, and on CUDA under OODK_VALIDATE=1. Otherwise the
// CUDA kernels stay within bounds whatever they are, and a wrong one makes its row NaN.
#pragma once

#include "ops/rows.h"

namespace oodk {

struct OutlierArgs : RowArgs {
  Tensor target; // (...,) int64, contiguous

  OutlierArgs(const char* op, const Tensor& logits, const Tensor& labels)
      : RowArgs{class_rows(op, logits), batch_sizes_of(logits)},
        target(checked_target(op, labels, *this)) {}

  void check_contents(const char* op) const {
    check_target_contents(op, target, logits.width, "OOD", -1);
  }
  // (..., 2): the largest logit m and S = sum exp(z - m). Kept apart, they are a log-sum-exp that
  // loses nothing where logits are large.
  Tensor new_stats() const {
    return empty(with(batch_sizes, {2}), out_type(), logits.tensor);
  }
  Tensor checked_rows(const char* op, const char* argument, const Tensor& t) const {
    return checked_like(op, argument, t, batch_sizes, *this);
  }
  Tensor checked_stats(const char* op, const Tensor& t) const {
    return checked_like(op, "stats", t, with(batch_sizes, {2}), *this);
  }
};

} // namespace oodk
