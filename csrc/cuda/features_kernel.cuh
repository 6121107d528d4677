// Statistics of rows of features, a block a row: each value read from device memory once where the
// row has room in shared memory, sums in float64.
#pragma once

#include <algorithm>

#include "common/percentile.h"
#include "cuda/ranking.cuh"

namespace oodk::cuda {

struct FeaturesInput {
  const void* features; // (rows, width), `stride` values from row to row
  DType dtype;
  int64_t rows, width, stride;
  bool rectified;
  const double* percentiles; // `count` a row, `step` from row to row
  int64_t count, step;
  cudaStream_t stream;
};

template <typename T>
struct FeatureStats {
  T *l1, *l2, *sum; // (rows,)
  T *threshold, *top_sum; // (rows, count)
};

template <typename S, typename T = acc_t<S>>
__global__ void __launch_bounds__(kRankingThreads, 4)
    feature_stats_kernel(FeaturesInput in, bool staged, FeatureStats<T> out) {
  extern __shared__ uint4 shared[];
  const bool first = threadIdx.x == 0;
  for (int64_t r = blockIdx.x; r < in.rows; r += gridDim.x) {
    const RankedRow<S> row{(const S*)in.features + r * in.stride, staged ? (T*)shared : nullptr,
        int(in.width), in.rectified};
    row.stage();
    const bool nan = row.holds_nan();
    const double l1 = row.sum([](double x) { return x < 0 ? -x : x; });
    const double square = row.sum([](double x) { return x * x; });
    const double sum = row.sum([](double x) { return x; });
    if (first) {
      out.l1[r] = T(l1);
      out.l2[r] = T(sqrt(square));
      out.sum[r] = T(sum);
    }
#pragma unroll 1
    for (int64_t p = 0; p < in.count; ++p) {
      const int k = nan ? 0 : int(count_above(in.width, in.percentiles[r * in.step + p]));
      T value = kNaN<T>, top = kNaN<T>;
      if (k > 0) { // the same for all threads
        const Ranked<T> found = kth_largest(row, k);
        value = found.value;
        const double above = row.sum([=](double x) { return x > double(found.value) ? x : 0.0; });
        top = T(above + double(found.equal) * double(value));
      }
      if (first) {
        out.threshold[r * in.count + p] = value;
        out.top_sum[r * in.count + p] = top;
      }
    }
  }
}

inline void feature_stats(
    const FeaturesInput& in, void* l1, void* l2, void* sum, void* threshold, void* top_sum) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    const RankingLaunch with = ranking_launch<S>(in.rows, in.width);
    launch(feature_stats_kernel<S, T>, with.blocks, kRankingThreads, with.shared, in.stream, in,
        with.shared > 0, FeatureStats<T>{(T*)l1, (T*)l2, (T*)sum, (T*)threshold, (T*)top_sum});
  });
}

} // namespace oodk::cuda
