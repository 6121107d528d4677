// Contract of indexed_distances (schema: library.cpp), shared by the CPU and the CUDA backend.
//
// Of each row of `x` (..., d) and the rows of `table` (K, d) that `index` (..., m) names: the inner
// product, and the L1 and L2 norms of the difference; products and sums in float64.
#pragma once

#include <utility>

#include "ops/rows.h"

namespace oodk {

struct Distances {
  Tensor inner, l1, l2; // each (..., m)
};

struct DistanceArgs {
  TensorRows x, table;
  Tensor index; // contiguous
  int64_t count; // m
};

inline DistanceArgs distance_args(
    const char* op, const Tensor& x, const Tensor& table, const Tensor& index) {
  TensorRows rows = as_rows(op, "x", x);
  OODK_CHECK_VALUE(
      rows.width >= 1, op, ": x must have at least one column, got shape ", shape_of(x));
  const ScalarType type = accumulate_type(rows.dtype);
  OODK_CHECK_TYPE(table.scalar_type() == type, op, ": table must be ",
      torch::headeronly::toString(type), ", got ",
      torch::headeronly::toString(table.scalar_type()));
  OODK_CHECK_VALUE(table.dim() == 2 && table.size(1) == rows.width, op,
      ": table must have shape (K, d) with the d of x, ", rows.width, ", got ", shape_of(table));
  OODK_CHECK_TYPE(index.scalar_type() == ScalarType::Long, op, ": index must be int64, got ",
      torch::headeronly::toString(index.scalar_type()));
  OODK_CHECK_VALUE(index.dim() == x.dim() && batch_sizes_of(index) == batch_sizes_of(x), op,
      ": index must have shape (..., m) for x (..., d), got ", shape_of(index), " for x ",
      shape_of(x));
  for (const auto& [name, t] : {std::pair{"table", &table}, std::pair{"index", &index}})
    OODK_CHECK_VALUE(device_of(*t) == device_of(x), op, ": ", name, " must be on the device of x, ",
        device_of(x), ", got ", device_of(*t));
  return {std::move(rows), as_rows(op, "table", table), torch::stable::contiguous(index),
      index.size(index.dim() - 1)};
}

inline void check_index(const char* op, const Tensor& index, int64_t rows) {
  const Tensor host = index.is_cpu() ? index : torch::stable::to(index, Device("cpu"));
  const int64_t* at = host.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < host.numel(); ++i)
    OODK_CHECK_VALUE(at[i] >= 0 && at[i] < rows, op, ": index must name rows of table, 0..",
        rows - 1, ", got ", at[i]);
}

inline Distances new_distances(const Tensor& index, const DistanceArgs& args) {
  const auto each = [&] {
    return empty(sizes_of(index), accumulate_type(args.x.dtype), args.x.tensor);
  };
  return {each(), each(), each()};
}

} // namespace oodk
