// CUDA backend of scaled_energy.
#include "ops/energy.h"

#include "cuda/device.h"
#include "cuda/energy_kernel.cuh"

namespace oodk {
namespace {

Tensor scaled_energy(const Tensor& logits, const Tensor& scale, const std::optional<Tensor>& bias) {
  const char* op = "scaled_energy";
  const EnergyArgs args = energy_args(op, logits, scale, bias);
  const cuda::OnDevice on(op, logits);
  cuda::check_width(op, args.logits.width);
  const Tensor out = new_scaled_energy(args);
  const TensorRows& rows = args.logits;
  if (rows.count * args.count > 0)
    cuda::scaled_energy({rows.tensor.const_data_ptr(), rows.dtype, rows.count, rows.width,
                            rows.stride, args.scale.const_data_ptr(), args.count,
                            args.bias ? args.bias->const_data_ptr() : nullptr, on.stream},
        out.mutable_data_ptr());
  return out;
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("scaled_energy", TORCH_BOX(&oodk::scaled_energy));
}
