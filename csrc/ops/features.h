// Contract of feature_stats (schema: library.cpp), shared by the CPU and the CUDA backend.
#pragma once

#include "ops/rows.h"

namespace oodk {

struct FeatureStats {
  Tensor l1, l2, sum; // each (...,)
  Tensor threshold, top_sum; // each (..., P)
};

struct FeatureArgs {
  TensorRows rows;
  Tensor percentiles; // float64, contiguous
  int64_t count,
      step; // P; values from a row's percentiles to the next row's, 0: all rows share them
};

inline TensorRows feature_rows(const char* op, const Tensor& features) {
  TensorRows rows = as_rows(op, "features", features);
  OODK_CHECK_VALUE(rows.width >= 1, op, ": features must have at least one feature, got shape ",
      shape_of(features));
  return rows;
}

inline void check_percentile(const char* op, double percentile) {
  OODK_CHECK_VALUE(percentile >= 0 && percentile <= 100, op,
      ": percentiles must be in per cent, in 0..100, got ", percentile);
}

inline void check_percentiles(const char* op, const Tensor& percentiles) {
  const Tensor host =
      percentiles.is_cpu() ? percentiles : torch::stable::to(percentiles, Device("cpu"));
  const double* p = host.const_data_ptr<double>();
  for (int64_t i = 0; i < host.numel(); ++i)
    check_percentile(op, p[i]);
}

inline FeatureArgs feature_args(const char* op, const Tensor& features, const Tensor& percentiles) {
  TensorRows rows = feature_rows(op, features);
  OODK_CHECK_TYPE(percentiles.scalar_type() == ScalarType::Double, op,
      ": percentiles must be float64, got ",
      torch::headeronly::toString(percentiles.scalar_type()));
  const int64_t dim = percentiles.dim();
  const auto each = [&] { // (..., P) of features (..., d)
    return dim == features.dim() && batch_sizes_of(percentiles) == batch_sizes_of(features);
  };
  OODK_CHECK_VALUE(dim == 1 || (dim > 1 && each()), op, ": percentiles must have shape (P,), or ",
      "(..., P) for features (..., d), got ", shape_of(percentiles), " for features ",
      shape_of(features));
  OODK_CHECK_VALUE(device_of(percentiles) == device_of(features), op, ": percentiles must be on ",
      "the device of features, ", device_of(features), ", got ", device_of(percentiles));
  const int64_t count = percentiles.size(dim - 1);
  return {rows, torch::stable::contiguous(percentiles), count, dim == 1 ? 0 : count};
}

inline FeatureStats new_feature_stats(const Tensor& features, const FeatureArgs& args) {
  const ScalarType type = accumulate_type(args.rows.dtype);
  const auto rows = [&] { return empty(batch_sizes_of(features), type, features); };
  const auto each = [&] {
    return empty(with(batch_sizes_of(features), {args.count}), type, features);
  };
  return {rows(), rows(), rows(), each(), each()};
}

} // namespace oodk
