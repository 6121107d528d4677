// What the contracts of the ops on rows of logits share.
#pragma once

#include "stable.h"

namespace oodk {

inline std::vector<int64_t> batch_sizes_of(const Tensor& logits) { // logits.sizes()[:-1]
  auto sizes = sizes_of(logits);
  sizes.pop_back();
  return sizes;
}

inline TensorRows class_rows(const char* op, const Tensor& logits) {
  TensorRows rows = as_rows(op, "logits", logits);
  OODK_CHECK_VALUE(
      rows.width >= 1, op, ": logits must have at least one class, got shape ", shape_of(logits));
  return rows;
}

struct RowArgs {
  TensorRows logits;
  std::vector<int64_t> batch_sizes;

  ScalarType out_type() const {
    return accumulate_type(logits.dtype);
  }
  Tensor new_gradient() const { // as logits, contiguous
    return empty(sizes_of(logits.tensor), logits.tensor.scalar_type(), logits.tensor);
  }
  Tensor new_rows(ScalarType dtype) const { // (...,)
    return empty(batch_sizes, dtype, logits.tensor);
  }
};

inline void check_same_device(
    const char* op, const char* argument, const Tensor& t, const Tensor& logits) {
  OODK_CHECK_VALUE(device_of(t) == device_of(logits), op, ": ", argument,
      " must be on the device of logits, ", device_of(logits), ", got ", device_of(t));
}

// A class index a row, or one other value.
inline Tensor checked_target(const char* op, const Tensor& target, const RowArgs& args) {
  OODK_CHECK_TYPE(target.scalar_type() == ScalarType::Long, op, ": target must be int64, got ",
      torch::headeronly::toString(target.scalar_type()));
  OODK_CHECK_VALUE(sizes_of(target) == args.batch_sizes, op, ": target must have shape ",
      "logits.shape[:-1], one class a row, got ", shape_of(target), " for logits ",
      shape_of(args.logits.tensor));
  check_same_device(op, "target", target, args.logits.tensor);
  return torch::stable::contiguous(target);
}

// `other`: the value that is no class, called `name`.
inline void check_target_contents(
    const char* op, const Tensor& target, int64_t classes, const char* name, int64_t other) {
  const Tensor host = target.is_cpu() ? target : torch::stable::to(target, Device("cpu"));
  const int64_t* t = host.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < host.numel(); ++i)
    OODK_CHECK_VALUE((t[i] >= 0 && t[i] < classes) || t[i] == other, op, ": target must be in 0..",
        classes - 1, " or ", name, " = ", other, ", got ", t[i], " in row ", i);
}

// A tensor that a forward op returned or autograd made, of the very shape and type it must have.
inline Tensor checked_like(const char* op, const char* argument, const Tensor& t,
    const std::vector<int64_t>& sizes, const RowArgs& args) {
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
