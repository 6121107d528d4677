// logsumexp of scale (z - b) + b of rows under several scales: a warp a row, which after the first
// scale is read from cache.
#pragma once

#include <algorithm>

#include "cuda/common.cuh"

namespace oodk::cuda {

struct EnergyInput {
  const void* logits; // (rows, width), `stride` values from row to row
  DType dtype;
  int64_t rows, width, stride;
  const void* scale; // (rows, count)
  int64_t count;
  const void* bias; // (width,) or null
  cudaStream_t stream;
};

// What is known of a row after some of its columns. NaN counts as the largest, as in torch.max.
template <typename T>
struct EnergyState {
  T m = -kInf<T>, s = 0;

  __device__ void add(T y) {
    merge({y, 1});
  }
  __device__ void merge(EnergyState other) {
    const T most = larger_or_nan(m, other.m);
    s = s * exp_fast(m - shift(most)) + other.s * exp_fast(other.m - shift(most));
    m = most;
  }
};

constexpr int kEnergyThreads = 128;

template <typename S, typename T = acc_t<S>>
__global__ void __launch_bounds__(kEnergyThreads) scaled_energy_kernel(EnergyInput in, T* energy) {
  constexpr int per_block = kEnergyThreads / kWarp;
  const int64_t step = int64_t(gridDim.x) * per_block;
  const int lane = int(threadIdx.x % kWarp);
  const T* const bias = (const T*)in.bias;
  for (int64_t r = int64_t(blockIdx.x) * per_block + threadIdx.x / kWarp; r < in.rows; r += step) {
    const S* const z = (const S*)in.logits + r * in.stride;
#pragma unroll 1
    for (int64_t p = r * in.count; p < (r + 1) * in.count; ++p) {
      const T scale = ((const T*)in.scale)[p];
      EnergyState<T> state;
      for (int j = lane; j < int(in.width); j += kWarp) {
        const T x = widen(z[j]);
        state.add(bias ? scale * (x - bias[j]) + bias[j] : scale * x);
      }
      for (int delta = 1; delta < kWarp; delta *= 2)
        state.merge(shuffle_down(state, delta));
      if (lane == 0)
        energy[p] = state.m - state.m == 0 ? state.m + log_of(state.s) : state.m;
    }
  }
}

// energy: (rows, count), double for float64 logits, else float, as scale and bias are.
inline void scaled_energy(const EnergyInput& in, void* energy) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    constexpr int per_block = kEnergyThreads / kWarp;
    const int64_t blocks = std::min<int64_t>(
        (in.rows + per_block - 1) / per_block, int64_t(Device::current().processors) * 64);
    launch(scaled_energy_kernel<S, T>, blocks, kEnergyThreads, 0, in.stream, in, (T*)energy);
  });
}

} // namespace oodk::cuda
