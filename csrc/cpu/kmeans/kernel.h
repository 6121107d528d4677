// The K-means kernels of one instruction set: raw pointers in, raw pointers out, one thread.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/frame.h"
#include "cpu/capability.h"

namespace oodk {

// Row i of a problem: the d values at x + ids[i] * stride, times scale[i], less center.
struct PointRows {
  const void* x;
  DType dtype;
  int64_t d, stride;
  const void* scale = nullptr; // T (n,), null for 1
  const int32_t* ids = nullptr; // (n,), null for 0..n-1
  const void* center = nullptr; // T (d,), null for 0
};

// T is double for float64 points, else float.
//
// `product` and `assign` multiply tiles of `tile` rows with panels of `panel` columns that stay in
// registers: rows are padded to whole tiles and lie `stride` values apart, columns are packed as
// [columns / panel][d][panel]. Whatever the tiling, an entry is the sum over the features in their
// order, so it has the same bits wherever it is computed.
template <typename T>
struct KmeansKernels {
  int64_t tile, panel;
  // Sums of d2 are kept for blocks of this many points: whole vectors of any instruction set, and
  // few enough to search one.
  static constexpr int64_t kBlock = 64;

  // |x|^2 (or 1 / |x|, with normalize; 1 for a zero row), NaN where the row is to be left out.
  void (*scales)(const PointRows&, int64_t begin, int64_t end, bool normalize, T* scale);
  // Rows [begin, end), `stride` apart; values past the d-th are 0.
  void (*load)(const PointRows&, int64_t begin, int64_t end, T* rows, int64_t stride);
  // Squared norm of a loaded row, summed as `product` does.
  T (*norm2)(const T* row, int64_t d);
  // Packs `count` loaded rows as columns, the last panel filled up with zeros.
  void (*pack)(const T* rows, int64_t stride, int64_t count, int64_t d, T* packed);
  // out[i * out_stride + j] = rows_i . column_j, for a number of tiles and panels.
  void (*product)(const T* rows, int64_t stride, int64_t tiles, int64_t d, const T* packed,
      int64_t panels, T* out, int64_t out_stride);
  // label = argmax_j (rows_i . column_j + bias_j), the lowest j of equals, -1 where all are -inf or
  // NaN; best = its value.
  void (*assign)(const T* rows, int64_t stride, int64_t tiles, int64_t d, const T* packed,
      const T* bias, int64_t panels, int32_t* label, T* best);
  // The same from products at hand: argmax_k (dots[k * stride + i] * factor_k + bias_k) for the
  // columns [begin, end), begin a multiple of kBlock. Reads whole blocks.
  void (*assign_products)(const T* dots, int64_t stride, int64_t k, const T* factor, const T* bias,
      int64_t begin, int64_t end, int32_t* label);
  // Sum of the rows at `members`, in that order: float within runs of 64 rows, double across.
  void (*sum_rows)(const PointRows&, const int32_t* members, int64_t count, T* sum);
  // Squared distance of row i to centroid label[i]; 0 where the label is negative.
  void (*distances)(const PointRows&, int64_t begin, int64_t end, const int32_t* label,
      const T* centroids, int64_t stride, T* distance);

  // Greedy k-means++ on squared distances, from norms and products with a candidate c:
  //   distance_i = max(0, norm2_i + norm2_c - 2 dots_i)
  // Both work on whole blocks: begin is a multiple of kBlock, and d2 is 0 past the last point.
  // Sum over [begin, end) of min(d2_i, distance_i).
  double (*potential)(
      const T* dots, T norm2_c, const T* norm2, const T* d2, int64_t begin, int64_t end);
  // d2_i = min(d2_i, distance_i), and the sum of each block.
  void (*absorb)(const T* dots, T norm2_c, const T* norm2, T* d2, int64_t begin, int64_t end,
      double* block_sums);
};

OODK_DECLARE_KERNELS(KmeansKernels<float>, kmeans_kernels_float)
OODK_DECLARE_KERNELS(KmeansKernels<double>, kmeans_kernels_double)

template <typename T>
const KmeansKernels<T>& kmeans_kernels() {
  if constexpr (sizeof(T) == 8)
    return OODK_SELECT_KERNELS(kmeans_kernels_double);
  else
    return OODK_SELECT_KERNELS(kmeans_kernels_float);
}

} // namespace oodk
