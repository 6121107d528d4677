// CPU backend of the MOS ops.
#include "ops/mos.h"

#include <algorithm>
#include <tuple>

#include "cpu/gradient.h"
#include "cpu/mos_kernel.h"
#include "cpu/parallel.h"

namespace oodk {
namespace {

struct MosCall {
  MosCall(const char* op, const Tensor& logits, const Tensor& groups)
      : args(mos_args(op, logits, groups)),
        offsets(checked_offsets(op, args.groups, args.logits.width)),
        rows{args.logits.tensor.const_data_ptr(), args.logits.dtype, args.logits.count,
            args.logits.width, args.logits.stride, offsets.data(), args.n_groups} {}

  template <typename F>
  void for_rows(const F& f) const {
    for_row_blocks(rows.rows, rows.width, f);
  }

  MosArgs args;
  std::vector<int64_t> offsets;
  MosRows rows;
};

const MosKernels& kernels() {
  return OODK_SELECT_KERNELS(mos_kernels);
}

Tensor mos_score(const Tensor& logits, const Tensor& groups) {
  const MosCall call("mos_score", logits, groups);
  Tensor score = call.args.new_rows(call.args.out_type());
  void* out = score.mutable_data_ptr();
  call.for_rows([&](int64_t begin, int64_t end) { kernels().score(call.rows, begin, end, out); });
  return score;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mos_predict(
    const Tensor& logits, const Tensor& groups) {
  const MosCall call("mos_predict", logits, groups);
  const ScalarType type = call.args.out_type();
  Tensor score = call.args.new_rows(type), log_odds = call.args.new_rows(type),
         prob = call.args.new_rows(type), label = call.args.new_rows(ScalarType::Long),
         group = call.args.new_rows(ScalarType::Long);
  void *s = score.mutable_data_ptr(), *o = log_odds.mutable_data_ptr(),
       *p = prob.mutable_data_ptr();
  int64_t *l = label.mutable_data_ptr<int64_t>(), *g = group.mutable_data_ptr<int64_t>();
  call.for_rows(
      [&](int64_t begin, int64_t end) { kernels().predict(call.rows, begin, end, s, o, l, g, p); });
  return {score, log_odds, label, group, prob};
}

std::tuple<Tensor, Tensor> mos_log_others(const Tensor& logits, const Tensor& groups) {
  const MosCall call("mos_log_others", logits, groups);
  Tensor log_others = call.args.new_groups(), stats = call.args.new_stats();
  void *out = log_others.mutable_data_ptr(), *st = stats.mutable_data_ptr();
  call.for_rows(
      [&](int64_t begin, int64_t end) { kernels().log_others(call.rows, begin, end, out, st); });
  return {log_others, stats};
}

// The target as the kernels take it, its contents checked.
struct CheckedTarget {
  CheckedTarget(const char* op, const MosCall& call, const Tensor& target, int64_t ignore_index)
      : tensor(checked_target(op, target, call.args)),
        group_of(call.rows.width - call.rows.groups),
        labels{tensor.const_data_ptr<int64_t>(), group_of.data(), ignore_index} {
    check_target_contents(op, tensor, int64_t(group_of.size()), "ignore_index", ignore_index);
    for (int64_t k = 0; k < call.rows.groups; ++k)
      std::fill(group_of.begin() + (call.offsets[k] - k),
          group_of.begin() + (call.offsets[k + 1] - (k + 1)), k);
  }
  Tensor tensor;
  std::vector<int64_t> group_of;
  MosTarget labels;
};

std::tuple<Tensor, Tensor> mos_loss(
    const Tensor& logits, const Tensor& target, const Tensor& groups, int64_t ignore_index) {
  const MosCall call("mos_loss", logits, groups);
  const CheckedTarget labels("mos_loss", call, target, ignore_index);
  Tensor loss = call.args.new_rows(call.args.out_type()), stats = call.args.new_stats();
  void *out = loss.mutable_data_ptr(), *st = stats.mutable_data_ptr();
  call.for_rows([&](int64_t begin, int64_t end) {
    kernels().loss(call.rows, begin, end, labels.labels, out, st);
  });
  return {loss, stats};
}

Tensor mos_log_others_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& groups, const Tensor& stats) {
  const char* op = "_mos_log_others_backward";
  const MosCall call(op, logits, groups);
  const int64_t k = call.args.n_groups;
  const Tensor g = checked_like(op, "grad", grad, with(call.args.batch_sizes, {k}), call.args);
  const Tensor st =
      checked_like(op, "stats", stats, with(call.args.batch_sizes, {k, 2}), call.args);
  Tensor out = new_gradient(call.args);
  const void *gp = g.const_data_ptr(), *sp = st.const_data_ptr();
  void* to = out.mutable_data_ptr();
  call.for_rows([&](int64_t begin, int64_t end) {
    kernels().log_others_backward(call.rows, begin, end, gp, sp, to);
  });
  return out;
}

Tensor mos_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
    const Tensor& groups, const Tensor& stats, int64_t ignore_index) {
  const char* op = "_mos_loss_backward";
  const MosCall call(op, logits, groups);
  const CheckedTarget labels(op, call, target, ignore_index);
  const Tensor g = checked_like(op, "grad", grad, call.args.batch_sizes, call.args);
  const Tensor st = checked_like(
      op, "stats", stats, with(call.args.batch_sizes, {call.args.n_groups, 2}), call.args);
  Tensor out = new_gradient(call.args);
  const void *gp = g.const_data_ptr(), *sp = st.const_data_ptr();
  void* to = out.mutable_data_ptr();
  call.for_rows([&](int64_t begin, int64_t end) {
    kernels().loss_backward(call.rows, begin, end, labels.labels, gp, sp, to);
  });
  return out;
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("mos_score", TORCH_BOX(&oodk::mos_score));
  m.impl("mos_predict", TORCH_BOX(&oodk::mos_predict));
  m.impl("_mos_log_others", TORCH_BOX(&oodk::mos_log_others));
  m.impl("_mos_log_others_backward", TORCH_BOX(&oodk::mos_log_others_backward));
  m.impl("_mos_loss", TORCH_BOX(&oodk::mos_loss));
  m.impl("_mos_loss_backward", TORCH_BOX(&oodk::mos_loss_backward));
}
