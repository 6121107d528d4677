// Contract of scaled_energy (schema: library.cpp), shared by the CPU and the CUDA backend.
//
// logsumexp over c of scale (z_c - b_c) + b_c, for each of a row's scales (..., P). Classes that
// together are below half a unit in the last place of the sum may be left out.
#pragma once

#include <optional>

#include "ops/rows.h"

namespace oodk {

struct EnergyArgs {
  TensorRows logits;
  Tensor scale; // (..., P), contiguous
  std::optional<Tensor> bias; // (C,), contiguous
  int64_t count; // P
};

inline EnergyArgs energy_args(
    const char* op, const Tensor& logits, const Tensor& scale, const std::optional<Tensor>& bias) {
  TensorRows rows = class_rows(op, logits);
  const ScalarType type = accumulate_type(rows.dtype);
  const auto check = [&](const char* argument, const Tensor& t) {
    OODK_CHECK_TYPE(t.scalar_type() == type, op, ": ", argument, " must be ",
        torch::headeronly::toString(type), ", got ", torch::headeronly::toString(t.scalar_type()));
    check_same_device(op, argument, t, logits);
  };
  check("scale", scale);
  OODK_CHECK_VALUE(scale.dim() == logits.dim() && batch_sizes_of(scale) == batch_sizes_of(logits),
      op, ": scale must have shape (..., P) for logits (..., C), got ", shape_of(scale),
      " for logits ", shape_of(logits));
  EnergyArgs args{
      std::move(rows), torch::stable::contiguous(scale), {}, scale.size(scale.dim() - 1)};
  if (bias) {
    check("bias", *bias);
    OODK_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == args.logits.width, op,
        ": bias must have shape (C,) = (", args.logits.width, ",), got ", shape_of(*bias));
    args.bias = torch::stable::contiguous(*bias);
  }
  return args;
}

inline Tensor new_scaled_energy(const EnergyArgs& args) { // (..., P)
  return empty(sizes_of(args.scale), accumulate_type(args.logits.dtype), args.logits.tensor);
}

} // namespace oodk
