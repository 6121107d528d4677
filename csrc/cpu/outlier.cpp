// CPU backend of outlier_cross_entropy.
#include "ops/outlier.h"

#include <tuple>

#include "cpu/gradient.h"
#include "cpu/outlier_kernel.h"
#include "cpu/parallel.h"

namespace oodk {
namespace {

const OutlierKernels& kernels() {
  return OODK_SELECT_KERNELS(outlier_kernels);
}

OutlierRows rows_of(const OutlierArgs& args) {
  const Rows& rows = args.logits;
  return {rows.tensor.const_data_ptr(), rows.dtype, rows.width, rows.stride,
      args.target.const_data_ptr<int64_t>()};
}

std::tuple<Tensor, Tensor, Tensor> outlier_cross_entropy(
    const Tensor& logits, const Tensor& target) {
  const char* op = "outlier_cross_entropy";
  const OutlierArgs args(op, logits, target);
  args.check_contents(op);
  const OutlierRows rows = rows_of(args);
  Tensor loss = args.new_rows(args.out_type()), logsumexp = args.new_rows(args.out_type()),
         stats = args.new_stats();
  void *l = loss.mutable_data_ptr(), *e = logsumexp.mutable_data_ptr(),
       *s = stats.mutable_data_ptr();
  for_row_blocks(args.logits.count, rows.width, [&](int64_t begin, int64_t end) {
    kernels().forward(rows, begin, end, l, e, s);
  });
  return {loss, logsumexp, stats};
}

Tensor outlier_cross_entropy_backward(const Tensor& grad_loss, const Tensor& grad_logsumexp,
    const Tensor& logits, const Tensor& target, const Tensor& stats) {
  const char* op = "_outlier_cross_entropy_backward";
  const OutlierArgs args(op, logits, target);
  args.check_contents(op);
  const Tensor g = args.checked_rows(op, "grad_loss", grad_loss);
  const Tensor h = args.checked_rows(op, "grad_logsumexp", grad_logsumexp);
  const Tensor st = args.checked_stats(op, stats);
  const OutlierRows rows = rows_of(args);
  Tensor out = new_gradient(args.logits.tensor);
  const void *gp = g.const_data_ptr(), *hp = h.const_data_ptr(), *sp = st.const_data_ptr();
  void* to = out.mutable_data_ptr();
  for_row_blocks(args.logits.count, rows.width, [&](int64_t begin, int64_t end) {
    kernels().backward(rows, begin, end, gp, hp, sp, to);
  });
  return out;
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("_outlier_cross_entropy", TORCH_BOX(&oodk::outlier_cross_entropy));
  m.impl("_outlier_cross_entropy_backward", TORCH_BOX(&oodk::outlier_cross_entropy_backward));
}
