// The nearest-neighbours kernels of one instruction set: raw pointers in, raw pointers out, one
// thread.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/capability.h"

namespace oodk {

// T is double for float64 rows, else float. Loaded rows are `stride` values apart, zero from the
// d-th on (KmeansKernels::load); bank rows are packed as columns as KmeansKernels::pack does.
template <typename T>
struct NeighborKernels {
  int64_t tile; // queries that `scan` takes at once
  static constexpr int64_t kMostRows = 16; // of a tile

  // Packs `count` loaded rows as [tiles][d][tile], the last tile filled up with zeros.
  void (*pack)(const T* rows, int64_t stride, int64_t count, int64_t d, T* tiles);
  // Squared norms of loaded rows.
  void (*norms)(const T* rows, int64_t stride, int64_t count, T* norm2);
  // The pairs of a tile's rows and the columns of so many panels that do not have
  // row . column + bias < floor (so that NaN passes): column * kMostRows + row each. Returns their
  // number.
  int64_t (*scan)(const T* tile, int64_t d, const T* columns, const T* bias, int64_t panels,
      const T* floor, int32_t* found);
  // Sum of the squared differences of two loaded rows: the same bits wherever it is taken.
  T (*distance)(const T* a, const T* b, int64_t stride);
};

OODK_DECLARE_KERNELS(NeighborKernels<float>, neighbor_kernels_float)
OODK_DECLARE_KERNELS(NeighborKernels<double>, neighbor_kernels_double)

template <typename T>
const NeighborKernels<T>& neighbor_kernels() {
  if constexpr (sizeof(T) == 8)
    return OODK_SELECT_KERNELS(neighbor_kernels_double);
  else
    return OODK_SELECT_KERNELS(neighbor_kernels_float);
}

} // namespace oodk
