// CUDA backend of feature_stats.
#include "ops/features.h"

#include <tuple>

#include "cuda/device.h"
#include "cuda/features_kernel.cuh"

namespace oodk {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feature_stats(
    const Tensor& features, const Tensor& percentiles, bool rectified) {
  const char* op = "feature_stats";
  const FeatureArgs args = feature_args(op, features, percentiles);
  const cuda::OnDevice on(op, features, "features");
  cuda::check_width(op, args.rows.width, "features");
  if (cuda::validate())
    check_percentiles(op, args.percentiles);
  const FeatureStats out = new_feature_stats(features, args);
  const TensorRows& rows = args.rows;
  if (rows.count > 0)
    cuda::feature_stats(
        {rows.tensor.const_data_ptr(), rows.dtype, rows.count, rows.width, rows.stride, rectified,
            args.percentiles.const_data_ptr<double>(), args.count, args.step, on.stream},
        out.l1.mutable_data_ptr(), out.l2.mutable_data_ptr(), out.sum.mutable_data_ptr(),
        out.threshold.mutable_data_ptr(), out.top_sum.mutable_data_ptr());
  return {out.l1, out.l2, out.sum, out.threshold, out.top_sum};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("feature_stats", TORCH_BOX(&oodk::feature_stats));
}
