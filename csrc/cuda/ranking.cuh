// A block finds the k-th largest value of a row by its digits: of the order-preserving integers of
// its values, eight bits at a time, the counts of the next digit say which is the k-th largest's.
#pragma once

#include <algorithm>

#include "common/order_key.h"
#include "cuda/block.cuh"

namespace oodk::cuda {

constexpr int kRankingThreads = 256; // a digit each
constexpr int kDigitBits = 8;

__device__ inline uint32_t bits_of(float x) {
  return float_bits(x);
}
__device__ inline uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Unsigned integers that order as values do; NaN has those beyond the infinities'.
template <typename T>
struct RankKey {
  using Bits = decltype(bits_of(T()));
  static constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);

  static __device__ Bits of(T x) {
    return Bits(order_key(bits_of(x))) ^ kSign;
  }
  static __device__ T value(Bits key) {
    const Bits bits = key & kSign ? key ^ kSign : ~key;
    T x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
};

// A row as its block reads it: from shared memory where it has room for it.
template <typename S, typename T = acc_t<S>>
struct RankedRow {
  const S* data;
  T* copy; // or null
  int width;
  bool rectified;

  __device__ T read(int j) const {
    const T x = widen(data[j]);
    return rectified && x < 0 ? T(0) : x;
  }
  __device__ T operator[](int j) const {
    return copy ? copy[j] : read(j);
  }
  __device__ void stage() const { // for whole blocks
    __syncthreads(); // the row before has been read
    if (copy)
#pragma unroll 2
      for (int j = int(threadIdx.x); j < width; j += kRankingThreads)
        copy[j] = read(j);
    __syncthreads();
  }
  __device__ bool holds_nan() const { // for whole blocks, as what follows
    int nan = 0;
#pragma unroll 2
    for (int j = int(threadIdx.x); j < width; j += kRankingThreads) {
      const T x = (*this)[j];
      nan |= x != x;
    }
    return __syncthreads_or(nan);
  }
  // Sum of f(x) in an order that depends on the width alone.
  template <typename F>
  __device__ double sum(const F& f) const {
    double mine = 0;
#pragma unroll 2
    for (int j = int(threadIdx.x); j < width; j += kRankingThreads)
      mine += f(double((*this)[j]));
    return block_sum(mine);
  }
};

template <typename T>
struct Ranked {
  T value; // the k-th largest
  int equal; // how many of those that equal it are among the k largest, at least 1
};

// 1 <= k <= width; no NaN.
template <typename S, typename T = acc_t<S>>
__device__ inline Ranked<T> kth_largest(const RankedRow<S>& row, int k) {
  using Key = RankKey<T>;
  using Bits = typename Key::Bits;
  __shared__ int counts[kRankingThreads];
  __shared__ int chosen[2]; // digit; which of the values that have it
  Bits key = 0, known = 0;
#pragma unroll 1
  for (int shift = int(8 * sizeof(Bits)) - kDigitBits; shift >= 0; shift -= kDigitBits) {
    counts[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 2
    for (int j = int(threadIdx.x); j < row.width; j += kRankingThreads) {
      const Bits bits = Key::of(row[j]);
      if ((bits & known) == key)
        atomicAdd(counts + int(bits >> shift & (kRankingThreads - 1)), 1);
    }
    __syncthreads();
    const int digit = kRankingThreads - 1 - int(threadIdx.x), count = counts[digit];
    int total;
    const int greater = block_exclusive_scan(count, total);
    if (greater < k && k <= greater + count) {
      chosen[0] = digit;
      chosen[1] = k - greater;
    }
    __syncthreads();
    key |= Bits(chosen[0]) << shift;
    known |= Bits(kRankingThreads - 1) << shift;
    k = chosen[1];
    __syncthreads();
  }
  return {Key::value(key), k};
}

struct RankingLaunch {
  int64_t blocks;
  size_t shared; // bytes
};

// A block a row, which is copied to shared memory if it has room there.
template <typename S>
RankingLaunch ranking_launch(int64_t rows, int64_t width) {
  constexpr size_t most = 40 << 10; // beside the static shared memory, and for any GPU
  const size_t bytes = size_t(width) * sizeof(acc_t<S>);
  return {std::min<int64_t>(rows, int64_t(Device::current().processors) * 8),
      bytes <= most ? bytes : 0};
}

} // namespace oodk::cuda
