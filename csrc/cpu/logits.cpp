// CPU backend of logit_scores.
#include "ops/logits.h"

#include <tuple>

#include "cpu/logits_kernel.h"
#include "cpu/parallel.h"

namespace oodk {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logit_scores(
    const Tensor& logits, double temperature) {
  const TensorRows rows = logit_args("logit_scores", logits, temperature);
  const LogitScores out = new_logit_scores(logits, rows.dtype);
  const void* z = rows.tensor.const_data_ptr();
  void *msp = out.msp.mutable_data_ptr(), *max_logit = out.max_logit.mutable_data_ptr(),
       *energy = out.energy.mutable_data_ptr(), *entropy = out.entropy.mutable_data_ptr();
  int64_t* label = out.label.mutable_data_ptr<int64_t>();
  const LogitKernels& kernels = OODK_SELECT_KERNELS(logit_kernels);
  for_row_blocks(rows.count, rows.width, [&](int64_t begin, int64_t end) {
    kernels.scores(z, rows.dtype, rows.width, rows.stride, temperature, begin, end, msp, max_logit,
        energy, entropy, label);
  });
  return {out.msp, out.max_logit, out.energy, out.entropy, out.label};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("logit_scores", TORCH_BOX(&oodk::logit_scores));
}
