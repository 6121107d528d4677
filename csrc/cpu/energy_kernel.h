// The kernel of energies of scaled logits, of one instruction set: raw pointers in, raw pointers out,
// one thread.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/capability.h"

namespace oodk {

struct EnergyKernels {
  // Rows [begin, end) of logits (rows, width), `stride` values apart. scale and energy are
  // (rows, count), bias (width,) or null; double for float64 logits, else float.
  void (*energies)(const void* logits, DType dtype, int64_t width, int64_t stride,
      const void* scale, int64_t count, const void* bias, int64_t begin, int64_t end, void* energy);
};

OODK_DECLARE_KERNELS(EnergyKernels, energy_kernels)

} // namespace oodk
