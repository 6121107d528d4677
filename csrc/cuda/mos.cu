// CUDA backend of the MOS ops. The contents of groups and target stay on the device: where they
// are invalid the kernels return NaN (mos_kernel.cuh), and OODK_VALIDATE=1 raises instead.
#include "ops/mos.h"

#include <tuple>

#include "cuda/device.h"
#include "cuda/mos_kernel.cuh"

namespace oodk {
namespace {

struct CudaMosCall {
  CudaMosCall(const char* op, const Tensor& logits, const Tensor& groups)
      : args(mos_args(op, logits, groups)), on(op, logits) {
    const TensorRows& rows = args.logits;
    cuda::check_width(op, rows.width);
    if (cuda::validate())
      checked_offsets(op, args.groups, rows.width);
    OODK_CHECK_VALUE(rows.width >= 2 * args.n_groups, op, ": groups must leave every group at ",
        "least 2 columns (others and one class), got ", args.n_groups,
        " groups for logits.size(-1) = ", rows.width);
  }

  bool empty() const {
    return args.logits.count == 0;
  }
  cuda::MosInput input() const {
    const TensorRows& rows = args.logits;
    return {rows.tensor.const_data_ptr(), rows.dtype, rows.count, rows.width, rows.stride,
        args.groups.const_data_ptr(), args.groups.scalar_type() == ScalarType::Long, args.n_groups,
        on.stream};
  }
  Tensor target(const char* op, const Tensor& target, int64_t ignore_index) const {
    Tensor t = checked_target(op, target, args);
    if (cuda::validate())
      check_target_contents(op, t, args.logits.width - args.n_groups, "ignore_index", ignore_index);
    return t;
  }
  MosArgs args;
  cuda::OnDevice on;
};

Tensor mos_score(const Tensor& logits, const Tensor& groups) {
  const CudaMosCall call("mos_score", logits, groups);
  Tensor score = call.args.new_rows(call.args.out_type());
  if (!call.empty())
    cuda::mos_score(call.input(), score.mutable_data_ptr());
  return score;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mos_predict(
    const Tensor& logits, const Tensor& groups) {
  const CudaMosCall call("mos_predict", logits, groups);
  const ScalarType type = call.args.out_type();
  Tensor score = call.args.new_rows(type), log_odds = call.args.new_rows(type),
         prob = call.args.new_rows(type), label = call.args.new_rows(ScalarType::Long),
         group = call.args.new_rows(ScalarType::Long);
  if (!call.empty())
    cuda::mos_predict(call.input(), score.mutable_data_ptr(), log_odds.mutable_data_ptr(),
        label.mutable_data_ptr<int64_t>(), group.mutable_data_ptr<int64_t>(),
        prob.mutable_data_ptr());
  return {score, log_odds, label, group, prob};
}

std::tuple<Tensor, Tensor> mos_log_others(const Tensor& logits, const Tensor& groups) {
  const CudaMosCall call("mos_log_others", logits, groups);
  Tensor log_others = call.args.new_groups(), stats = call.args.new_stats();
  if (!call.empty())
    cuda::mos_log_others(call.input(), log_others.mutable_data_ptr(), stats.mutable_data_ptr());
  return {log_others, stats};
}

std::tuple<Tensor, Tensor> mos_loss(
    const Tensor& logits, const Tensor& target, const Tensor& groups, int64_t ignore_index) {
  const char* op = "mos_loss";
  const CudaMosCall call(op, logits, groups);
  const Tensor t = call.target(op, target, ignore_index);
  Tensor loss = call.args.new_rows(call.args.out_type()), stats = call.args.new_stats();
  if (!call.empty())
    cuda::mos_loss(call.input(), t.const_data_ptr<int64_t>(), ignore_index, loss.mutable_data_ptr(),
        stats.mutable_data_ptr());
  return {loss, stats};
}

Tensor mos_log_others_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& groups, const Tensor& stats) {
  const char* op = "_mos_log_others_backward";
  const CudaMosCall call(op, logits, groups);
  const int64_t k = call.args.n_groups;
  const Tensor g = checked_like(op, "grad", grad, with(call.args.batch_sizes, {k}), call.args);
  const Tensor s = checked_like(op, "stats", stats, with(call.args.batch_sizes, {k, 2}), call.args);
  Tensor out = call.args.new_gradient();
  if (!call.empty())
    cuda::mos_log_others_backward(
        call.input(), g.const_data_ptr(), s.const_data_ptr(), out.mutable_data_ptr());
  return out;
}

Tensor mos_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
    const Tensor& groups, const Tensor& stats, int64_t ignore_index) {
  const char* op = "_mos_loss_backward";
  const CudaMosCall call(op, logits, groups);
  const int64_t k = call.args.n_groups;
  const Tensor t = call.target(op, target, ignore_index);
  const Tensor g = checked_like(op, "grad", grad, call.args.batch_sizes, call.args);
  const Tensor s = checked_like(op, "stats", stats, with(call.args.batch_sizes, {k, 2}), call.args);
  Tensor out = call.args.new_gradient();
  if (!call.empty())
    cuda::mos_loss_backward(call.input(), t.const_data_ptr<int64_t>(), ignore_index,
        g.const_data_ptr(), s.const_data_ptr(), out.mutable_data_ptr());
  return out;
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("mos_score", TORCH_BOX(&oodk::mos_score));
  m.impl("mos_predict", TORCH_BOX(&oodk::mos_predict));
  m.impl("_mos_log_others", TORCH_BOX(&oodk::mos_log_others));
  m.impl("_mos_log_others_backward", TORCH_BOX(&oodk::mos_log_others_backward));
  m.impl("_mos_loss", TORCH_BOX(&oodk::mos_loss));
  m.impl("_mos_loss_backward", TORCH_BOX(&oodk::mos_loss_backward));
}
