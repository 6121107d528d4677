// Contract of logit_scores (schema: library.cpp), shared by the CPU and the CUDA backend.
#pragma once

#include "ops/rows.h"

#include <cmath>

namespace oodk {

struct LogitScores {
  Tensor msp, max_logit, energy, entropy, label; // each (...,)
};

inline TensorRows logit_args(const char* op, const Tensor& logits, double temperature) {
  TensorRows rows = class_rows(op, logits);
  OODK_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), op,
      ": temperature must be positive and finite, got ", temperature);
  return rows;
}

inline LogitScores new_logit_scores(const Tensor& logits, DType dtype) {
  const auto rows = [&](ScalarType type) { return empty(batch_sizes_of(logits), type, logits); };
  const ScalarType type = accumulate_type(dtype);
  return {rows(type), rows(type), rows(type), rows(type), rows(ScalarType::Long)};
}

} // namespace oodk
