// CUDA backend of shape_features_.
#include "ops/shape.h"

#include "cuda/device.h"
#include "cuda/shape_kernel.cuh"

namespace oodk {
namespace {

void shape_features_(const Tensor& features, const std::string& shape,
    std::optional<double> percentile, const std::optional<Tensor>& low,
    const std::optional<Tensor>& high) {
  const char* op = "shape_features_";
  const ShapeArgs args = shape_args(features, shape, percentile, low, high);
  const TensorRows& rows = args.rows;
  const cuda::OnDevice on(op, features, "features");
  cuda::check_width(op, rows.width, "features");
  if (rows.count == 0)
    return;
  const auto from = ShapeArgs::limit(args.low), to = ShapeArgs::limit(args.high);
  cuda::shape_features({rows.tensor.mutable_data_ptr(), rows.dtype, rows.count, rows.width,
      rows.stride, args.shape, args.k, from.data, to.data, from.step, to.step, on.stream});
  put_back(features, args);
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("shape_features_", TORCH_BOX(&oodk::shape_features_));
}
