// CUDA backend of logit_scores.
#include "ops/logits.h"

#include <tuple>

#include "cuda/device.h"
#include "cuda/logits_kernel.cuh"

namespace oodk {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logit_scores(
    const Tensor& logits, double temperature) {
  const char* op = "logit_scores";
  const TensorRows rows = logit_args(op, logits, temperature);
  const cuda::OnDevice on(op, logits);
  cuda::check_width(op, rows.width);
  const LogitScores out = new_logit_scores(logits, rows.dtype);
  if (rows.count > 0)
    cuda::logit_scores(
        {rows.tensor.const_data_ptr(), rows.dtype, rows.count, rows.width, rows.stride, on.stream},
        temperature, out.msp.mutable_data_ptr(), out.max_logit.mutable_data_ptr(),
        out.energy.mutable_data_ptr(), out.entropy.mutable_data_ptr(),
        out.label.mutable_data_ptr<int64_t>());
  return {out.msp, out.max_logit, out.energy, out.entropy, out.label};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("logit_scores", TORCH_BOX(&oodk::logit_scores));
}
