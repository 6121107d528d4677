// Contract of nearest_neighbors (schema: library.cpp), shared by the CPU and the CUDA backend.
//
// The k rows of `bank` (N, d) with the least squared distances to each row of `queries` (..., d), by
// ascending distance, equal distances by ascending row. A distance is the sum of the squares of the
// differences, in float64 where queries and bank are float64, else in float32: it follows from the
// two rows alone, so neither the other queries nor how a bank is cut into pieces changes a bit. With
// `normalize` every row is divided by its Euclidean norm as it is read; a zero row stays zero. A
// query that holds NaN or infinity, or whose squared norm overflows, has the distances NaN and the
// rows -1; a bank that holds such a row is refused where its contents are looked at, and elsewhere
// the row is nobody's neighbour.
#pragma once

#include "ops/kmeans.h"

namespace oodk {

struct NeighborArgs {
  TensorRows queries, bank;
  int64_t k;
  Tensor distances, indices; // the outputs, (..., k)
};

inline NeighborArgs neighbor_args(
    const char* op, const Tensor& queries, const Tensor& bank, int64_t k) {
  TensorRows rows = as_rows(op, "queries", queries);
  const DType dtype = float_dtype(op, "bank", bank);
  OODK_CHECK_TYPE((dtype == DType::f64) == (rows.dtype == DType::f64), op,
      ": bank must be float64 where queries are, and only there, got ",
      torch::headeronly::toString(bank.scalar_type()), " for queries ",
      torch::headeronly::toString(queries.scalar_type()));
  check_device_of(op, "bank", bank, "queries", queries);
  OODK_CHECK_VALUE(rows.width >= 1, op, ": queries must have at least one feature, got shape ",
      shape_of(queries));
  OODK_CHECK_VALUE(bank.dim() == 2 && bank.size(1) == rows.width, op,
      ": bank must have shape (N, d) with the d of queries, ", rows.width, ", got ",
      shape_of(bank));
  OODK_CHECK_VALUE(k >= 1 && k <= bank.size(0), op,
      ": k must be at least 1 and at most the rows of bank, ", bank.size(0), ", got ", k);
  std::vector<int64_t> sizes = leading(queries, 1);
  sizes.push_back(k);
  Tensor distances = empty(sizes, accumulate_type(rows.dtype), queries);
  Tensor indices = empty(sizes, ScalarType::Long, queries);
  return {std::move(rows), as_rows(op, "bank", bank), k, std::move(distances), std::move(indices)};
}

// `first`: of the rows of the bank, the first that is not finite; as many as there are for none.
inline void check_bank(const char* op, int64_t first, int64_t rows) {
  OODK_CHECK_VALUE(first >= rows, op,
      ": bank must be finite, squared norms too, got a row that is not, row ", first);
}

} // namespace oodk
