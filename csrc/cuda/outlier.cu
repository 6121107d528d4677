// CUDA backend of outlier_cross_entropy. The contents of target stay on the device: where they are
// wrong the kernels return NaN (outlier_kernel.cuh), and OODK_VALIDATE=1 raises instead.
#include "ops/outlier.h"

#include <tuple>

#include "cuda/device.h"
#include "cuda/outlier_kernel.cuh"

namespace oodk {
namespace {

struct CudaOutlierCall {
  CudaOutlierCall(const char* op, const Tensor& logits, const Tensor& target)
      : args(op, logits, target), on(op, logits) {
    cuda::check_width(op, args.logits.width);
    if (cuda::validate())
      args.check_contents(op);
  }

  bool empty() const {
    return args.logits.count == 0;
  }
  cuda::OutlierInput input() const {
    const TensorRows& rows = args.logits;
    return {rows.tensor.const_data_ptr(), rows.dtype, rows.count, rows.width, rows.stride,
        args.target.const_data_ptr<int64_t>(), on.stream};
  }

  OutlierArgs args;
  cuda::OnDevice on;
};

std::tuple<Tensor, Tensor, Tensor> outlier_cross_entropy(
    const Tensor& logits, const Tensor& target) {
  const CudaOutlierCall call("outlier_cross_entropy", logits, target);
  const ScalarType type = call.args.out_type();
  Tensor loss = call.args.new_rows(type), logsumexp = call.args.new_rows(type),
         stats = call.args.new_stats();
  if (!call.empty())
    cuda::outlier_cross_entropy(call.input(), loss.mutable_data_ptr(), logsumexp.mutable_data_ptr(),
        stats.mutable_data_ptr());
  return {loss, logsumexp, stats};
}

Tensor outlier_cross_entropy_backward(const Tensor& grad_loss, const Tensor& grad_logsumexp,
    const Tensor& logits, const Tensor& target, const Tensor& stats) {
  const char* op = "_outlier_cross_entropy_backward";
  const CudaOutlierCall call(op, logits, target);
  const Tensor g = call.args.checked_rows(op, "grad_loss", grad_loss);
  const Tensor h = call.args.checked_rows(op, "grad_logsumexp", grad_logsumexp);
  const Tensor s = call.args.checked_stats(op, stats);
  Tensor out = call.args.new_gradient();
  if (!call.empty())
    cuda::outlier_cross_entropy_backward(call.input(), g.const_data_ptr(), h.const_data_ptr(),
        s.const_data_ptr(), out.mutable_data_ptr());
  return out;
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("_outlier_cross_entropy", TORCH_BOX(&oodk::outlier_cross_entropy));
  m.impl("_outlier_cross_entropy_backward", TORCH_BOX(&oodk::outlier_cross_entropy_backward));
}
