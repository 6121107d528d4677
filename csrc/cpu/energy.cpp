// CPU backend of scaled_energy.
#include "ops/energy.h"

#include "cpu/energy_kernel.h"
#include "cpu/parallel.h"

namespace oodk {
namespace {

Tensor scaled_energy(const Tensor& logits, const Tensor& scale, const std::optional<Tensor>& bias) {
  const EnergyArgs args = energy_args("scaled_energy", logits, scale, bias);
  const Tensor out = new_scaled_energy(args);
  const TensorRows& rows = args.logits;
  const void *z = rows.tensor.const_data_ptr(), *factors = args.scale.const_data_ptr();
  const void* b = args.bias ? args.bias->const_data_ptr() : nullptr;
  void* energy = out.mutable_data_ptr();
  const EnergyKernels& kernels = OODK_SELECT_KERNELS(energy_kernels);
  for_row_blocks(rows.count, rows.width, [&](int64_t begin, int64_t end) {
    kernels.energies(
        z, rows.dtype, rows.width, rows.stride, factors, args.count, b, begin, end, energy);
  });
  return out;
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("scaled_energy", TORCH_BOX(&oodk::scaled_energy));
}
