// Contract of roc_histogram_ (schema: library.cpp), shared by the CPU and the CUDA backend.
#pragma once

#include "stable.h"

#include <optional>

#include "common/histogram_key.h"

namespace oodk {

struct HistogramArgs {
  Tensor scores; // contiguous
  std::optional<Tensor> rows; // one byte a score, contiguous
  Tensor table;
  std::optional<Tensor> atoms;
  DType dtype;
  int64_t n, row, n_rows, width; // width: a row of counts, facts included

  HistogramTable lookup() const {
    const int64_t n_atoms = atoms ? atoms->numel() : 0;
    return {reinterpret_cast<const uint64_t*>(table.const_data_ptr<int64_t>()),
        n_atoms ? atoms->const_data_ptr<int32_t>() : nullptr, width - n_atoms - kFacts, n_atoms};
  }
  const uint8_t* row_ptr() const {
    return rows ? static_cast<const uint8_t*>(rows->const_data_ptr()) : nullptr;
  }
};

inline HistogramArgs histogram_args(const Tensor& counts, const Tensor& table, const Tensor& scores,
    int64_t row, const std::optional<Tensor>& rows, const std::optional<Tensor>& atoms,
    const char* op = "roc_histogram_") {
  const DType dtype = float_dtype(op, "scores", scores);
  const auto check = [&](const char* argument, const Tensor& t, ScalarType type) {
    OODK_CHECK_TYPE(t.scalar_type() == type, op, ": ", argument, " must be ",
        torch::headeronly::toString(type), ", got ", torch::headeronly::toString(t.scalar_type()));
    OODK_CHECK_VALUE(device_of(t) == device_of(scores), op, ": ", argument,
        " must be on the device of scores, ", device_of(scores), ", got ", device_of(t));
  };
  check("counts", counts, ScalarType::Long);
  check("table", table, ScalarType::Long);
  OODK_CHECK_VALUE(table.dim() == 1 && table.size(0) == 65536, op,
      ": table must have shape (65536,), got ", shape_of(table));
  if (atoms) {
    check("atoms", *atoms, ScalarType::Int);
    OODK_CHECK_VALUE(atoms->dim() == 1, op, ": atoms must have shape (A,), got ", shape_of(*atoms));
  }
  const int64_t n_atoms = atoms ? atoms->numel() : 0;
  OODK_CHECK_VALUE(counts.dim() == 2 && counts.size(1) > n_atoms + kFacts, op,
      ": counts must have shape (rows, bins + atoms + ", int64_t(kFacts),
      "), at least one bin, got ", shape_of(counts), " for ", n_atoms, " atoms");
  OODK_CHECK_VALUE(counts.is_contiguous(), op, ": counts must be contiguous");
  OODK_CHECK_VALUE(row >= 0 && row < counts.size(0), op, ": side must be in 0..",
      counts.size(0) - 1, ", got ", row);
  std::optional<Tensor> bytes, keys;
  if (atoms)
    keys = torch::stable::contiguous(*atoms);
  if (rows) {
    const ScalarType type = rows->scalar_type();
    OODK_CHECK_TYPE(type == ScalarType::Byte || type == ScalarType::Bool, op,
        ": rows must be uint8 or bool, got ", torch::headeronly::toString(type));
    check("rows", *rows, type);
    OODK_CHECK_VALUE(sizes_of(*rows) == sizes_of(scores), op,
        ": rows must have the shape of scores, ", shape_of(scores), ", got ", shape_of(*rows));
    bytes = torch::stable::contiguous(*rows);
  }
  return {torch::stable::contiguous(scores), bytes, torch::stable::contiguous(table), keys, dtype,
      scores.numel(), row, counts.size(0), counts.size(1)};
}

} // namespace oodk
