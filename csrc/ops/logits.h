// Contract of logit_scores (schema: library.cpp), shared by the CPU and the CUDA backend.
#pragma once

#include "stable.h"

#include <cmath>

namespace oodk {

struct LogitScores {
  Tensor msp, max_logit, energy, entropy, label; // each (...,)
};

inline Rows logit_args(const char* op, const Tensor& logits, double temperature) {
  Rows rows = as_rows(op, "logits", logits);
  OODK_CHECK_VALUE(rows.width >= 1, op, ": logits must have at least one class, got shape ",
      shape_of(logits));
  OODK_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), op,
      ": temperature must be positive and finite, got ", temperature);
  return rows;
}

inline LogitScores new_logit_scores(const Tensor& logits, DType dtype) {
  auto sizes = sizes_of(logits);
  sizes.pop_back();
  const auto rows = [&](ScalarType type) { return empty(sizes, type, logits); };
  const ScalarType type = accumulate_type(dtype);
  return {rows(type), rows(type), rows(type), rows(type), rows(ScalarType::Long)};
}

} // namespace oodk
