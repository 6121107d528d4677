// Inner products and distances of rows and the rows of a table that they name: a warp a pair, sums in
// float64.
#pragma once

#include <algorithm>

#include "cuda/common.cuh"

namespace oodk::cuda {

struct DistancesInput {
  const void* x; // (rows, width), `stride` values from row to row
  DType dtype;
  int64_t rows, width, stride;
  const void* table; // (table_rows, width)
  int64_t table_rows, table_stride;
  const int64_t* index; // (rows, count)
  int64_t count;
  cudaStream_t stream;
};

struct DistanceSums {
  double inner = 0, l1 = 0, square = 0;

  __device__ void merge(DistanceSums other) {
    inner += other.inner;
    l1 += other.l1;
    square += other.square;
  }
};

constexpr int kDistanceThreads = 128;

template <typename S, typename T = acc_t<S>>
__global__ void __launch_bounds__(kDistanceThreads)
    indexed_distances_kernel(DistancesInput in, T* inner, T* l1, T* l2) {
  constexpr int per_block = kDistanceThreads / kWarp;
  const int64_t step = int64_t(gridDim.x) * per_block;
  const int lane = int(threadIdx.x % kWarp);
  for (int64_t i = int64_t(blockIdx.x) * per_block + threadIdx.x / kWarp; i < in.rows * in.count;
      i += step) {
    const int64_t at = in.index[i];
    const bool known = at >= 0 && at < in.table_rows; // the same for all lanes
    const S* const x = (const S*)in.x + i / in.count * in.stride;
    const T* const t = (const T*)in.table + (known ? at : 0) * in.table_stride;
    DistanceSums sums;
    for (int j = lane; j < int(in.width) && known; j += kWarp) {
      const double a = double(widen(x[j])), b = double(t[j]), d = a - b;
      sums.inner += a * b;
      sums.l1 += fabs(d);
      sums.square += d * d;
    }
    for (int delta = 1; delta < kWarp; delta *= 2)
      sums.merge(shuffle_down(sums, delta));
    if (lane == 0) {
      inner[i] = known ? T(sums.inner) : kNaN<T>;
      l1[i] = known ? T(sums.l1) : kNaN<T>;
      l2[i] = known ? T(sqrt(sums.square)) : kNaN<T>;
    }
  }
}

// The outputs are (rows, count), double for float64 rows, else float, as the table is.
inline void indexed_distances(const DistancesInput& in, void* inner, void* l1, void* l2) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    constexpr int per_block = kDistanceThreads / kWarp;
    const int64_t blocks = std::min<int64_t>((in.rows * in.count + per_block - 1) / per_block,
        int64_t(Device::current().processors) * 64);
    launch(indexed_distances_kernel<S, T>, blocks, kDistanceThreads, 0, in.stream, in, (T*)inner,
        (T*)l1, (T*)l2);
  });
}

} // namespace oodk::cuda
