// Shaping rows of features in place, a block a row.
#pragma once

#include <algorithm>

#include "common/shape.h"
#include "cuda/ranking.cuh"

namespace oodk::cuda {

struct ShapeInput {
  void* features; // (rows, width), `stride` values from row to row
  DType dtype;
  int64_t rows, width, stride;
  Shape shape;
  int64_t k; // how many are kept, or the number of bins, whose edges are low and factors high
  const void *low, *high; // or null; the next feature's is `step` values on
  int64_t low_step, high_step;
  cudaStream_t stream;
};

template <typename S, typename T = acc_t<S>>
__global__ void __launch_bounds__(kRankingThreads) bound_kernel(ShapeInput in) {
  const T *const low = (const T*)in.low, *const high = (const T*)in.high;
  for (int64_t r = blockIdx.x; r < in.rows; r += gridDim.x) {
    S* const row = (S*)in.features + r * in.stride;
    for (int j = int(threadIdx.x); j < int(in.width); j += kRankingThreads) {
      const T x = widen(row[j]), most = high[j * in.high_step];
      const T clipped = x > most ? most : x; // NaN stays
      row[j] = narrow<S>(low && x < low[j * in.low_step] ? T(0) : clipped);
    }
  }
}

// Values in [low[k], low[k + 1]) times high[k], others 0; NaN stays.
template <typename S, typename T = acc_t<S>>
__global__ void __launch_bounds__(kRankingThreads) weigh_kernel(ShapeInput in) {
  const T *const edges = (const T*)in.low, *const factors = (const T*)in.high;
  const int bins = int(in.k);
  const T first = edges[0], end = edges[bins], width = (end - first) / T(bins);
  for (int64_t r = blockIdx.x; r < in.rows; r += gridDim.x) {
    S* const row = (S*)in.features + r * in.stride;
    for (int j = int(threadIdx.x); j < int(in.width); j += kRankingThreads) {
      const T x = widen(row[j]);
      T y = x == x ? T(0) : x;
      if (x >= first && x < end) {
        const T guess = (x - first) / width;
        int k = guess > 0 ? guess < T(bins - 1) ? int(guess) : bins - 1 : 0;
        while (x < edges[k]) // right away where bins are equal, but for rounding
          --k;
        while (x >= edges[k + 1])
          ++k;
        y = x * factors[k];
      }
      row[j] = narrow<S>(y);
    }
  }
}

// The first column after the `wanted` first values that equal `value`. For whole blocks.
template <typename S, typename T = acc_t<S>>
__device__ inline int end_of(const RankedRow<S>& row, T value, int wanted) {
  __shared__ int end;
  if (threadIdx.x == 0)
    end = row.width;
  __syncthreads();
#pragma unroll 1
  for (int first = 0, before = 0; first < row.width && before < wanted; first += kRankingThreads) {
    const int j = first + int(threadIdx.x);
    const int equal = j < row.width && row[j] == value;
    int total;
    const int at = before + block_exclusive_scan(equal, total);
    if (equal && at == wanted - 1)
      end = j + 1;
    before += total;
  }
  __syncthreads();
  return end;
}

template <typename S, typename T = acc_t<S>>
__global__ void __launch_bounds__(kRankingThreads, 4) reshape_kernel(ShapeInput in, bool staged) {
  extern __shared__ uint4 shared[];
  for (int64_t r = blockIdx.x; r < in.rows; r += gridDim.x) {
    S* const out = (S*)in.features + r * in.stride;
    const RankedRow<S> row{out, staged ? (T*)shared : nullptr, int(in.width), false};
    row.stage();
    const bool nan = row.holds_nan();
    Ranked<T> last{kNaN<T>, 0};
    double sum = 0, top = 0;
    int end = 0;
    if (!nan) { // the same for all threads
      last = kth_largest(row, int(in.k));
      sum = row.sum([](double x) { return x; });
      top = row.sum([=](double x) { return x > double(last.value) ? x : 0.0; }) +
          double(last.equal) * double(last.value);
      end = end_of(row, last.value, last.equal);
    }
    const T factor = T(exp(sum / top)), mean = T(sum / double(in.k));
    for (int j = int(threadIdx.x); j < row.width; j += kRankingThreads) {
      const T x = row[j];
      const bool kept = x > last.value || (x == last.value && j < end);
      T y = in.shape == Shape::ash_p ? x : in.shape == Shape::ash_b ? mean : x * factor;
      if (in.shape != Shape::scale && !kept)
        y = 0;
      out[j] = narrow<S>(nan ? kNaN<T> : y);
    }
  }
}

inline void shape_features(const ShapeInput& in) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    const RankingLaunch with = ranking_launch<S>(in.rows, in.width);
    if (in.shape == Shape::optfs)
      launch(weigh_kernel<S, acc_t<S>>, with.blocks, kRankingThreads, 0, in.stream, in);
    else if (in.shape == Shape::clip || in.shape == Shape::vra)
      launch(bound_kernel<S, acc_t<S>>, with.blocks, kRankingThreads, 0, in.stream, in);
    else
      launch(reshape_kernel<S, acc_t<S>>, with.blocks, kRankingThreads, with.shared, in.stream, in,
          with.shared > 0);
  });
}

} // namespace oodk::cuda
