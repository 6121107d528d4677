// CUDA backend of gen_scores.
#include "ops/gen.h"

#include "cuda/device.h"
#include "cuda/gen_kernel.cuh"

namespace oodk {
namespace {

Tensor gen_scores(
    const Tensor& logits, const std::vector<double>& gamma, const std::vector<int64_t>& m) {
  const char* op = "gen_scores";
  const GenArgs args = gen_args(op, logits, gamma, m);
  const TensorRows& rows = args.rows;
  const cuda::OnDevice on(op, logits);
  cuda::check_width(op, rows.width);
  const Tensor out = new_gen_scores(logits, args);
  if (rows.count > 0 && !gamma.empty())
    cuda::gen_scores(
        {rows.tensor.const_data_ptr(), rows.dtype, rows.count, rows.width, rows.stride, on.stream},
        gamma.data(), args.m.data(), int64_t(gamma.size()), out.mutable_data_ptr());
  return out;
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("gen_scores", TORCH_BOX(&oodk::gen_scores));
}
