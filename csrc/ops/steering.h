// Contract of _steer_histogram_ (schema: library.cpp).
#pragma once

#include "stable.h"

#include <optional>

#include "ops/histogram.h"

namespace oodk {

constexpr int64_t kLevels = 9; // a block of level l has 4^l bins
constexpr int64_t kPrefixes = 65536;

struct SteeringArgs {
  HistogramArgs histogram;
  int64_t bins, n_atoms;
};

inline SteeringArgs steering_args(const Tensor& counts, const Tensor& blocks, const Tensor& table,
    const Tensor& atoms, const Tensor& used, const Tensor& scale, const Tensor& adapted,
    const Tensor& scores, int64_t side, const std::optional<Tensor>& rows, double share) {
  constexpr const char* op = "_steer_histogram_";
  const HistogramArgs args = histogram_args(counts, table, scores, side, rows, atoms, op);
  const auto check = [&](const char* argument, const Tensor& t, ScalarType type,
                         const std::vector<int64_t>& sizes, const char* shape) {
    OODK_CHECK_TYPE(t.scalar_type() == type, op, ": ", argument, " must be ",
        torch::headeronly::toString(type), ", got ", torch::headeronly::toString(t.scalar_type()));
    OODK_CHECK_VALUE(device_of(t) == device_of(scores), op, ": ", argument,
        " must be on the device of scores, ", device_of(scores), ", got ", device_of(t));
    OODK_CHECK_VALUE(sizes_of(t) == sizes && t.is_contiguous(), op, ": ", argument,
        " must be contiguous, of shape ", shape, ", got ", shape_of(t));
  };
  check("blocks", blocks, ScalarType::Int, {kLevels, kPrefixes}, "(9, 65536)");
  check("table", table, ScalarType::Long, {kPrefixes}, "(65536,)");
  check("atoms", atoms, ScalarType::Int, {atoms.numel()}, "(A,)");
  check("used", used, ScalarType::Long, {}, "()");
  check("scale", scale, ScalarType::Double, {}, "()");
  check("adapted", adapted, ScalarType::Long, {}, "()");
  OODK_CHECK_VALUE(share > 0, op, ": share must be positive, got ", share);
  const int64_t n_atoms = atoms.numel();
  return {args, args.width - n_atoms - kFacts, n_atoms};
}

} // namespace oodk
