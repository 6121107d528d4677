// Contract of the MOS ops (schemas: library.cpp), shared by the CPU and the CUDA backend.
//
// The contents of groups and target are checked on the CPU, and on CUDA under OODK_VALIDATE=1.
// Otherwise CUDA kernels stay within bounds whatever they hold: groups that are not valid make
// every result NaN (label and group 0), a target that is not makes its row's loss and gradient NaN.
#pragma once

#include "ops/rows.h"

namespace oodk {

// One value a row (`out`), or two a row and group: see stats() below.
struct MosArgs : RowArgs {
  Tensor groups; // (K + 1,) int32 or int64, contiguous
  int64_t n_groups;

  Tensor new_groups() const { // (..., K)
    return empty(with(batch_sizes, {n_groups}), out_type(), logits.tensor);
  }
  // (..., K, 2): per group the largest logit m and S = sum exp(z - m), others included. Kept apart,
  // they are a log-sum-exp that loses nothing where logits are large.
  Tensor new_stats() const {
    return empty(with(batch_sizes, {n_groups, 2}), out_type(), logits.tensor);
  }
};

// Shapes, types and devices; the contents of groups are checked by checked_offsets().
inline MosArgs mos_args(const char* op, const Tensor& logits, const Tensor& groups) {
  TensorRows rows = as_rows(op, "logits", logits);
  const ScalarType index = groups.scalar_type();
  OODK_CHECK_TYPE(index == ScalarType::Long || index == ScalarType::Int, op,
      ": groups must be int32 or int64 offsets, got ", torch::headeronly::toString(index));
  OODK_CHECK_VALUE(
      groups.dim() == 1, op, ": groups must have shape (K + 1,), got ", shape_of(groups));
  OODK_CHECK_VALUE(
      groups.size(0) >= 2, op, ": groups must hold K + 1 >= 2 offsets, got ", groups.size(0));
  check_same_device(op, "groups", groups, logits);
  return {{std::move(rows), batch_sizes_of(logits)}, torch::stable::contiguous(groups),
      groups.size(0) - 1};
}

// The offsets on the host, valid for rows of `width` logits. They ascend from 0 to the width, which
// is checked without a subtraction that could wrap.
inline std::vector<int64_t> checked_offsets(const char* op, const Tensor& groups, int64_t width) {
  const Tensor host = groups.is_cpu() ? groups : torch::stable::to(groups, Device("cpu"));
  const int64_t n = host.size(0);
  std::vector<int64_t> offsets(n);
  for (int64_t i = 0; i < n; ++i)
    offsets[i] = host.scalar_type() == ScalarType::Int ? host.const_data_ptr<int32_t>()[i]
                                                       : host.const_data_ptr<int64_t>()[i];
  OODK_CHECK_VALUE(offsets[0] == 0, op, ": groups must start at 0, got ", offsets[0]);
  for (int64_t k = 0; k + 1 < n; ++k)
    OODK_CHECK_VALUE(offsets[k + 1] >= 2 && offsets[k] <= offsets[k + 1] - 2, op,
        ": every group must be at least 2 columns wide (others and one class), got group ", k,
        " from ", offsets[k], " to ", offsets[k + 1]);
  OODK_CHECK_VALUE(offsets[n - 1] == width, op, ": groups must end at logits.size(-1) = ", width,
      ", got ", offsets[n - 1]);
  return offsets;
}

} // namespace oodk
