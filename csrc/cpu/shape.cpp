// CPU backend of shape_features_.
#include "ops/shape.h"

#include "cpu/parallel.h"
#include "cpu/shape_kernel.h"

namespace oodk {
namespace {

void shape_features_(const Tensor& features, const std::string& shape,
    std::optional<double> percentile, const std::optional<Tensor>& low,
    const std::optional<Tensor>& high) {
  const ShapeArgs args = shape_args(features, shape, percentile, low, high);
  const TensorRows& rows = args.rows;
  void* x = rows.tensor.mutable_data_ptr();
  const auto from = ShapeArgs::limit(args.low), to = ShapeArgs::limit(args.high);
  const ShapeKernels& kernels = OODK_SELECT_KERNELS(shape_kernels);
  for_row_blocks(rows.count, rows.width, [&](int64_t begin, int64_t end) {
    kernels.shape(x, rows.dtype, rows.width, rows.stride, args.shape, args.k, from.data, from.step,
        to.data, to.step, begin, end);
  });
  put_back(features, args);
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("shape_features_", TORCH_BOX(&oodk::shape_features_));
}
