// Gradients of softmaxes: one read of the logits, one write of dL/dz, with the statistics that the
// forward op saved. A thread stays with one unit (16 bytes) of the gradient's rows and goes from
// row to row, the next row's logits on their way while it works.
#pragma once

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/rows.cuh"

namespace oodk::cuda {

// Of one softmax: its largest logit and the sum of e^(z - m).
template <typename T>
struct alignas(2 * sizeof(T)) Stats {
  T m, total;
};

constexpr int kBackwardThreads = 256; // of a block; they do nothing together
template <typename S>
constexpr int kBackwardBlocks = sizeof(S) == sizeof(double) ? 3 : 4; // on a multiprocessor

// The logits at the columns [column, column + V) of a row, as far as it has them. The columns are a
// unit of the gradient, which need not be a unit of the logits.
template <typename S>
__device__ inline uint4 load(const Rows<S>& z, int64_t row, int column) {
  constexpr int V = kPerUnit<S>;
  const S* const from = z[row] + column;
  if (column >= 0 && column + V <= z.width && skew(from) == 0)
    return __ldg((const uint4*)from);
  S x[V];
#pragma unroll
  for (int e = 0; e < V; ++e)
    x[e] = column + e >= 0 && column + e < z.width ? from[e] : S{};
  uint4 unit;
  memcpy(&unit, x, sizeof(unit));
  return unit;
}

template <typename S>
__device__ inline void store(const acc_t<S> (&y)[kPerUnit<S>], int column, int width, S* to) {
  constexpr int V = kPerUnit<S>;
  if (column >= 0 && column + V <= width) {
    __stcs(
        (uint4*)(to + column), pack<S>(y)); // one store of 16 bytes, which nothing reads again soon
    return;
  }
#pragma unroll
  for (int e = 0; e < V; ++e)
    if (column + e >= 0 && column + e < width)
      to[column + e] = narrow<S>(y[e]);
}

struct GradientGrid {
  int units; // the most that a row of the gradient has
  int64_t blocks;

  template <typename S>
  GradientGrid(const Rows<S>& z, const void* grad_logits) {
    constexpr int V = kPerUnit<S>;
    const bool aligned = uintptr_t(grad_logits) % sizeof(uint4) == 0 && z.width % V == 0;
    units = int((int64_t(z.width) + (aligned ? 0 : 2 * V - 2)) / V);
    const auto needed = [&](int64_t rows) {
      return (rows * units + kBackwardThreads - 1) / kBackwardThreads;
    };
    blocks =
        std::max(needed(1), std::min<int64_t>(needed(z.count), Device::current().processors * 16));
  }
};

// f(row, column, x, y) gives dL/dz y of the logits x at [column, column + V), of which those before
// column 0 or from the width on count for nothing. All threads of the grid call this together.
template <typename S, typename F>
__device__ inline void write_gradient(const Rows<S>& z, int units, S* grad_logits, F f) {
  using T = acc_t<S>;
  constexpr int V = kPerUnit<S>;
  const unsigned thread = blockIdx.x * kBackwardThreads + threadIdx.x;
  const unsigned rows_at_once = gridDim.x * kBackwardThreads / units;
  int64_t r = thread / units;
  if (r >= rows_at_once || r >= z.count)
    return;
  const auto column_in = [&](int64_t row) {
    return int(thread % units) * V - skew(grad_logits + row * z.width);
  };
  int column = column_in(r);
  uint4 logits = load(z, r, column);
  while (true) {
    const int64_t next_r = r + rows_at_once;
    const int next_column = column_in(next_r);
    uint4 next_logits{};
    if (next_r < z.count)
      next_logits = load(z, next_r, next_column);

    T x[V], y[V];
    unpack<S>(logits, x);
    f(r, column, x, y);
    store(y, column, z.width, grad_logits + r * z.width);

    if (next_r >= z.count)
      return;
    r = next_r;
    column = next_column;
    logits = next_logits;
  }
}

} // namespace oodk::cuda
