// Contract of gen_scores (schema: library.cpp), shared by the CPU and the CUDA backend.
#pragma once

#include <cmath>

#include "ops/rows.h"

namespace oodk {

struct GenArgs {
  TensorRows rows;
  std::vector<int64_t> m; // of each setting, at most the number of classes
};

inline GenArgs gen_args(const char* op, const Tensor& logits, const std::vector<double>& gamma,
    const std::vector<int64_t>& m) {
  GenArgs args{class_rows(op, logits), m};
  OODK_CHECK_VALUE(gamma.size() == m.size(), op, ": gamma and m must be as many, got ",
      gamma.size(), " and ", m.size());
  for (const double g : gamma)
    OODK_CHECK_VALUE(g > 0 && std::isfinite(g), op, ": gamma must be positive and finite, got ", g);
  for (int64_t& one : args.m) {
    OODK_CHECK_VALUE(one >= 1, op, ": m must be at least 1, got ", one);
    one = one < args.rows.width ? one : args.rows.width;
  }
  return args;
}

inline Tensor new_gen_scores(const Tensor& logits, const GenArgs& args) { // (..., S)
  return empty(with(batch_sizes_of(logits), {int64_t(args.m.size())}),
      accumulate_type(args.rows.dtype), logits);
}

} // namespace oodk
