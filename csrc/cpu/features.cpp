// CPU backend of feature_stats.
#include "ops/features.h"

#include <tuple>

#include "cpu/features_kernel.h"
#include "cpu/parallel.h"

namespace oodk {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feature_stats(
    const Tensor& features, const Tensor& percentiles, bool rectified) {
  const char* op = "feature_stats";
  const FeatureArgs args = feature_args(op, features, percentiles);
  check_percentiles(op, args.percentiles);
  const FeatureStats out = new_feature_stats(features, args);
  const TensorRows& rows = args.rows;
  const void* x = rows.tensor.const_data_ptr();
  const double* p = args.percentiles.const_data_ptr<double>();
  void *l1 = out.l1.mutable_data_ptr(), *l2 = out.l2.mutable_data_ptr(),
       *sum = out.sum.mutable_data_ptr(), *threshold = out.threshold.mutable_data_ptr(),
       *top_sum = out.top_sum.mutable_data_ptr();
  const FeatureKernels& kernels = OODK_SELECT_KERNELS(feature_kernels);
  for_row_blocks(rows.count, rows.width, [&](int64_t begin, int64_t end) {
    kernels.stats(x, rows.dtype, rows.width, rows.stride, rectified, p, args.count, args.step,
        begin, end, l1, l2, sum, threshold, top_sum);
  });
  return {out.l1, out.l2, out.sum, out.threshold, out.top_sum};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("feature_stats", TORCH_BOX(&oodk::feature_stats));
}
