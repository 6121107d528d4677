#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/histogram_key.h"
#include "cpu/capability.h"

namespace oodk {

struct HistogramInput {
  const void* scores;
  DType dtype;
  const uint8_t* rows; // added to `row`, or null
  int64_t row, n_rows;
  HistogramTable table;

  OODK_HOST_DEVICE int64_t width() const {
    return table.bins + table.n_atoms + kFacts;
  }
};

// Adds `sign` for each of the scores [begin, end) to counts (n_rows, width()). Low bits are ORed
// whatever the sign.
struct HistogramKernels {
  void (*count)(const HistogramInput&, int64_t begin, int64_t end, int sign, int64_t* counts);
  void (*count_private)(const HistogramInput&, int64_t begin, int64_t end, uint32_t* counts);
};

OODK_DECLARE_KERNELS(HistogramKernels, histogram_kernels)

} // namespace oodk
