// Contract of shape_features_ (schema: library.cpp), shared by the CPU and the CUDA backend.
#pragma once

#include <algorithm>
#include <iterator>
#include <optional>

#include "common/percentile.h"
#include "common/shape.h"
#include "ops/features.h"

namespace oodk {

struct ShapeArgs {
  TensorRows rows; // features, or a copy of them
  bool copied;
  Shape shape;
  int64_t k; // how many are kept, or the number of bins
  std::optional<Tensor> low, high; // contiguous, of the type that features are accumulated in

  // A limit, null where there is none, and the values from one feature's to the next's.
  struct Limit {
    const void* data;
    int64_t step;
  };
  static Limit limit(const std::optional<Tensor>& t) {
    return t ? Limit{t->const_data_ptr(), t->numel() > 1} : Limit{nullptr, 0};
  }
};

inline ShapeArgs shape_args(const Tensor& features, const std::string& shape,
    std::optional<double> percentile, const std::optional<Tensor>& low,
    const std::optional<Tensor>& high) {
  constexpr const char* op = "shape_features_";
  constexpr const char* names[] = {"clip", "vra", "ash-p", "ash-b", "ash-s", "scale", "optfs"};
  const auto name = std::find(std::begin(names), std::end(names), shape);
  OODK_CHECK_VALUE(name != std::end(names), op,
      ": shape must be clip, vra, ash-p, ash-b, ash-s, scale or optfs, got '", shape, "'");
  ShapeArgs args{feature_rows(op, features), false, Shape(name - std::begin(names)), 0, {}, {}};
  args.copied = args.rows.tensor.const_data_ptr() != features.const_data_ptr();
  for (int64_t i = 0; i < features.dim(); ++i)
    OODK_CHECK_VALUE(features.size(i) <= 1 || features.stride(i) != 0, op,
        ": features must not share memory with each other, got stride 0 in dimension ", i);
  const bool binned = args.shape == Shape::optfs;
  const bool ranked = args.shape != Shape::clip && args.shape != Shape::vra && !binned;
  const auto check = [&](const char* argument, bool given, bool wanted) {
    OODK_CHECK_VALUE(given == wanted, op, ": ", argument, " must ", wanted ? "" : "not ",
        "be given for ", shape);
  };
  check("percentile", percentile.has_value(), ranked);
  check("low", low.has_value(), args.shape == Shape::vra || binned);
  check("high", high.has_value(), !ranked);
  const int64_t width = args.rows.width;
  const auto limit = [&](const char* argument, const std::optional<Tensor>& t) {
    if (!t)
      return std::optional<Tensor>();
    const ScalarType type = accumulate_type(args.rows.dtype);
    OODK_CHECK_TYPE(t->scalar_type() == type, op, ": ", argument, " must be ",
        torch::headeronly::toString(type), ", got ", torch::headeronly::toString(t->scalar_type()));
    OODK_CHECK_VALUE(binned || (t->dim() == 1 && (t->size(0) == 1 || t->size(0) == width)), op,
        ": ", argument, " must have shape (1,) or (", width, ",), got ", shape_of(*t));
    OODK_CHECK_VALUE(device_of(*t) == device_of(features), op, ": ", argument,
        " must be on the device of features, ", device_of(features), ", got ", device_of(*t));
    return std::optional<Tensor>(torch::stable::contiguous(*t));
  };
  args.low = limit("low", low);
  args.high = limit("high", high);
  OODK_CHECK_VALUE(!binned ||
          (low->dim() == 1 && high->dim() == 1 && high->size(0) >= 1 &&
              low->size(0) == high->size(0) + 1),
      op, ": low and high must have shapes (bins + 1,) and (bins,) for optfs, got ",
      low ? shape_of(*low) : "", " and ", high ? shape_of(*high) : "");
  if (binned)
    args.k = high->size(0);
  if (ranked) {
    OODK_CHECK_VALUE(*percentile >= 0 && *percentile <= 100, op,
        ": percentile must be in per cent, in 0..100, got ", *percentile);
    args.k = count_above(width, *percentile);
  }
  return args;
}

inline void put_back(const Tensor& features, const ShapeArgs& args) {
  if (args.copied) {
    Tensor self = features;
    torch::stable::copy_(self, args.rows.tensor);
  }
}

} // namespace oodk
