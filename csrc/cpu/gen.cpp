// CPU backend of gen_scores.
#include "ops/gen.h"

#include "cpu/gen_kernel.h"
#include "cpu/parallel.h"

namespace oodk {
namespace {

Tensor gen_scores(
    const Tensor& logits, const std::vector<double>& gamma, const std::vector<int64_t>& m) {
  const GenArgs args = gen_args("gen_scores", logits, gamma, m);
  const TensorRows& rows = args.rows;
  const Tensor out = new_gen_scores(logits, args);
  const void* z = rows.tensor.const_data_ptr();
  void* scores = out.mutable_data_ptr();
  const GenKernels& kernels = OODK_SELECT_KERNELS(gen_kernels);
  if (!gamma.empty())
    for_row_blocks(rows.count, rows.width, [&](int64_t begin, int64_t end) {
      kernels.scores(z, rows.dtype, rows.width, rows.stride, gamma.data(), args.m.data(),
          int64_t(gamma.size()), begin, end, scores);
    });
  return out;
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("gen_scores", TORCH_BOX(&oodk::gen_scores));
}
