// Contract of the MOS ops (schemas: library.cpp), shared by the CPU and the CUDA backend.
//
// The contents of groups and target are checked on the CPU, and on CUDA under OODK_VALIDATE=1.
// Otherwise CUDA kernels stay within bounds whatever they hold: groups that are not valid make
// every result NaN (label and group 0), a target that is not makes its row's loss and gradient NaN.
#pragma once

#include "stable.h"

#include <cstdlib>

namespace oodk {

// One value a row (`out`), or two a row and group: see stats() below.
struct MosArgs {
  Rows logits;
  Tensor groups; // (K + 1,) int32 or int64, contiguous
  int64_t n_groups;
  std::vector<int64_t> batch_sizes; // logits.sizes()[:-1]

  ScalarType out_type() const {
    return accumulate_type(logits.dtype);
  }
  Tensor new_rows(ScalarType dtype) const { // (...,)
    return empty(batch_sizes, dtype, logits.tensor);
  }
  Tensor new_groups() const { // (..., K)
    auto sizes = batch_sizes;
    sizes.push_back(n_groups);
    return empty(sizes, out_type(), logits.tensor);
  }
  // (..., K, 2): per group the largest logit m and S = sum exp(z - m), others included. Kept apart,
  // they are a log-sum-exp that loses nothing where logits are large.
  Tensor new_stats() const {
    auto sizes = batch_sizes;
    sizes.push_back(n_groups);
    sizes.push_back(2);
    return empty(sizes, out_type(), logits.tensor);
  }
};

inline void check_same_device(
    const char* op, const char* argument, const Tensor& t, const Tensor& logits) {
  OODK_CHECK_VALUE(device_of(t) == device_of(logits), op, ": ", argument,
      " must be on the device of logits, ", device_of(logits), ", got ", device_of(t));
}

// Shapes, types and devices; the contents of groups are checked by checked_offsets().
inline MosArgs mos_args(const char* op, const Tensor& logits, const Tensor& groups) {
  Rows rows = as_rows(op, "logits", logits);
  const ScalarType index = groups.scalar_type();
  OODK_CHECK_TYPE(index == ScalarType::Long || index == ScalarType::Int, op,
      ": groups must be int32 or int64 offsets, got ", torch::headeronly::toString(index));
  OODK_CHECK_VALUE(groups.dim() == 1, op, ": groups must have shape (K + 1,), got ", shape_of(groups));
  OODK_CHECK_VALUE(groups.size(0) >= 2, op,
      ": groups must hold K + 1 >= 2 offsets, got ", groups.size(0));
  check_same_device(op, "groups", groups, logits);
  auto batch = sizes_of(logits);
  batch.pop_back();
  return {std::move(rows), torch::stable::contiguous(groups), groups.size(0) - 1, std::move(batch)};
}

// The offsets on the host, valid for rows of `width` logits.
inline std::vector<int64_t> checked_offsets(const char* op, const Tensor& groups, int64_t width) {
  const Tensor host = groups.is_cpu() ? groups : torch::stable::to(groups, Device("cpu"));
  const int64_t n = host.size(0);
  std::vector<int64_t> offsets(n);
  for (int64_t i = 0; i < n; ++i)
    offsets[i] = host.scalar_type() == ScalarType::Int ? host.const_data_ptr<int32_t>()[i]
                                                       : host.const_data_ptr<int64_t>()[i];
  OODK_CHECK_VALUE(offsets[0] == 0, op, ": groups must start at 0, got ", offsets[0]);
  for (int64_t k = 0; k + 1 < n; ++k)
    OODK_CHECK_VALUE(offsets[k + 1] - offsets[k] >= 2, op,
        ": every group must be at least 2 columns wide (others and one class), got group ", k,
        " from ", offsets[k], " to ", offsets[k + 1]);
  OODK_CHECK_VALUE(offsets[n - 1] == width, op, ": groups must end at logits.size(-1) = ", width,
      ", got ", offsets[n - 1]);
  return offsets;
}

// A class index a row, or ignore_index.
inline Tensor checked_target(const char* op, const Tensor& target, const MosArgs& args) {
  OODK_CHECK_TYPE(target.scalar_type() == ScalarType::Long, op,
      ": target must be int64, got ", torch::headeronly::toString(target.scalar_type()));
  OODK_CHECK_VALUE(sizes_of(target) == args.batch_sizes, op, ": target must have shape ",
      "logits.shape[:-1], one class a row, got ", shape_of(target), " for logits ",
      shape_of(args.logits.tensor));
  check_same_device(op, "target", target, args.logits.tensor);
  return torch::stable::contiguous(target);
}

// `classes` = columns - groups.
inline void check_target_contents(
    const char* op, const Tensor& target, int64_t classes, int64_t ignore_index) {
  const Tensor host = target.is_cpu() ? target : torch::stable::to(target, Device("cpu"));
  const int64_t* t = host.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < host.numel(); ++i)
    OODK_CHECK_VALUE((t[i] >= 0 && t[i] < classes) || t[i] == ignore_index, op,
        ": target must be in 0..", classes - 1, " or ignore_index = ", ignore_index, ", got ", t[i],
        " in row ", i);
}

// A tensor that a forward op returned or autograd made, of the very shape and type it must have.
inline Tensor checked_like(const char* op, const char* argument, const Tensor& t,
    const std::vector<int64_t>& sizes, const MosArgs& args) {
  OODK_CHECK_TYPE(t.scalar_type() == args.out_type(), op, ": ", argument, " must be ",
      torch::headeronly::toString(args.out_type()), ", got ",
      torch::headeronly::toString(t.scalar_type()));
  OODK_CHECK_VALUE(sizes_of(t) == sizes, op, ": ", argument, " has the wrong shape, ", shape_of(t));
  check_same_device(op, argument, t, args.logits.tensor);
  return torch::stable::contiguous(t);
}

inline std::vector<int64_t> with(std::vector<int64_t> sizes, std::initializer_list<int64_t> tail) {
  sizes.insert(sizes.end(), tail);
  return sizes;
}

} // namespace oodk
