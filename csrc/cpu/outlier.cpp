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
  const TensorRows& rows = args.logits;
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
  for_row_blocks(args.logits.count, rows.width,
      [&](int64_t begin, int64_t end) { kernels().forward(rows, begin, end, l, e, s); });
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
  Tensor out = new_gradient(args);
  const void *gp = g.const_data_ptr(), *hp = h.const_data_ptr(), *sp = st.const_data_ptr();
  void* to = out.mutable_data_ptr();
  for_row_blocks(args.logits.count, rows.width,
      [&](int64_t begin, int64_t end) { kernels().backward(rows, begin, end, gp, hp, sp, to); });
  return out;
}

std::tuple<Tensor, Tensor> outlier_loss(
    const Tensor& logits, const Tensor& target, double weight, bool absent, bool mean) {
  const char* op = "outlier_cross_entropy";
  const OutlierArgs args(op, logits, target);
  args.check_contents(op);
  const OutlierRows rows = rows_of(args);
  const int64_t count = args.logits.count;
  int64_t n_ood = 0;
  for (int64_t r = 0; r < count; ++r)
    n_ood += rows.target[r] == -1 || (absent && rows.target[r] == rows.width - 1);
  const auto share = [&](int64_t n) { return mean && n > 0 ? 1.0 / double(n) : 1.0; };
  const OutlierWeights weights{share(count - n_ood), weight * share(n_ood), absent};
  const Tensor each = args.new_rows(args.out_type());
  Tensor grad = new_gradient(args), loss = empty({}, args.out_type(), logits);
  void *e = each.mutable_data_ptr(), *to = grad.mutable_data_ptr();
  for_row_blocks(count, rows.width, [&](int64_t begin, int64_t end) {
    kernels().loss_and_gradient(rows, begin, end, weights, e, to);
  });
  const auto sum = [&](auto* values) {
    double total = 0;
    for (int64_t r = 0; r < count; ++r)
      total += values[r];
    return total;
  };
  if (rows.dtype == DType::f64)
    *loss.mutable_data_ptr<double>() = sum((const double*)e);
  else
    *loss.mutable_data_ptr<float>() = float(sum((const float*)e));
  return {loss, grad};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("_outlier_cross_entropy", TORCH_BOX(&oodk::outlier_cross_entropy));
  m.impl("_outlier_cross_entropy_backward", TORCH_BOX(&oodk::outlier_cross_entropy_backward));
  m.impl("_outlier_loss", TORCH_BOX(&oodk::outlier_loss));
}
