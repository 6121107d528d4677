// What the threads of a warp, or of a block, do together. Sums are taken in an order that depends
// on the number of threads alone. Blocks are whole warps.
#pragma once

#include "cuda/common.cuh"

namespace oodk::cuda {

__device__ inline int lane_id() {
  return int(threadIdx.x) % kWarp;
}
__device__ inline int warp_id() {
  return int(threadIdx.x) / kWarp;
}

// Warps that share a piece of work: those of this block, or of the blocks 0..blocks-1 of a piece.
struct Warps {
  int index, count;

  static __device__ Warps of_block() {
    return {warp_id(), int(blockDim.x) / kWarp};
  }
  static __device__ Warps of_blocks(int block, int blocks) {
    const int each = int(blockDim.x) / kWarp;
    return {block * each + warp_id(), blocks * each};
  }
};

// The sum of all lanes' values, the same bits in every lane.
template <typename V>
__device__ inline V warp_sum(V value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <typename V>
__device__ inline V warp_inclusive_scan(V value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const V before = __shfl_up_sync(kAllLanes, value, step);
    if (lane_id() >= step)
      value += before;
  }
  return value;
}

// To be called by all threads of a block, as everything below. Sum of their values, in all of them.
template <typename V>
__device__ inline V block_sum(V value) {
  __shared__ V sums[kWarp];
  value = warp_sum(value);
  if (lane_id() == 0)
    sums[warp_id()] = value;
  __syncthreads();
  V sum = 0;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w)
    sum += sums[w];
  __syncthreads();
  return sum;
}

// Sum of the values of the threads before this one, and of all.
__device__ inline int block_exclusive_scan(int value, int& total) {
  __shared__ int sums[kWarp];
  const int inclusive = warp_inclusive_scan(value);
  if (lane_id() == kWarp - 1)
    sums[warp_id()] = inclusive;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) {
    before += w < warp_id() ? sums[w] : 0;
    total += sums[w];
  }
  __syncthreads();
  return before + inclusive - value;
}

// --- members of clusters: a stable counting sort, each warp with a run of consecutive items ------

// A block's table for the sort, (warps, k).
struct Histogram {
  int* counts;
  int k;

  static __host__ __device__ int64_t size(int threads, int k) {
    return int64_t(threads / kWarp) * k;
  }
  __device__ int* of_warp(int w) const {
    return counts + int64_t(w) * k;
  }
};

// f(i, c, same) on this warp's items in order, 32 at a time: c = label(i), -1 where that is outside
// 0..k-1 or i past the end, and `same` are the lanes that have this c.
template <typename Label, typename F>
__device__ inline void for_items(int n, int k, const Label& label, const F& f) {
  const int warps = int(blockDim.x) / kWarp;
  const int run = (n + warps * kWarp - 1) / (warps * kWarp) * kWarp;
  const int begin = int(min(int64_t(warp_id()) * run, int64_t(n))), end = min(begin + run, n);
  for (int first = begin; first < end; first += kWarp) {
    const int i = first + lane_id();
    const int64_t found = i < end ? int64_t(label(i)) : -1;
    const int c = found >= 0 && found < k ? int(found) : -1;
    f(i, c, __match_any_sync(kAllLanes, c));
    __syncwarp();
  }
}

// First step: label(i) is called once for each of the n items.
template <typename Label>
__device__ inline void count_members(int n, Histogram table, const Label& label) {
  for (int64_t e = threadIdx.x; e < Histogram::size(int(blockDim.x), table.k); e += blockDim.x)
    table.counts[e] = 0;
  __syncthreads();
  int* const mine = table.of_warp(warp_id());
  for_items(n, table.k, label, [=](int, int c, unsigned same) {
    if (c >= 0 && lane_id() == __ffs(int(same)) - 1)
      mine[c] += __popc(same);
  });
  __syncthreads();
}

// Second: the members of cluster c will be at start[c] .. start[c + 1] - 1.
__device__ inline void place_clusters(Histogram table, int* start) {
  const int warps = int(blockDim.x) / kWarp;
  int before = 0;
  for (int first = 0; first < table.k; first += int(blockDim.x)) {
    const int c = first + int(threadIdx.x);
    int size = 0, total;
    for (int w = 0; w < warps && c < table.k; ++w)
      size += table.of_warp(w)[c];
    int at = before + block_exclusive_scan(size, total);
    before += total;
    if (c < table.k)
      start[c] = at;
    for (int w = 0; w < warps && c < table.k; ++w) { // from counts to places
      const int count = table.of_warp(w)[c];
      table.of_warp(w)[c] = at;
      at += count;
    }
  }
  if (threadIdx.x == 0)
    start[table.k] = before;
  __syncthreads();
}

// Third: order[start[c]], order[start[c] + 1] ... are the members of c, ascending.
template <typename Label>
__device__ inline void place_members(int n, Histogram table, const Label& label, int* order) {
  int* const mine = table.of_warp(warp_id());
  for_items(n, table.k, label, [=](int i, int c, unsigned same) {
    const unsigned below = same & ((1u << lane_id()) - 1);
    if (c >= 0)
      order[mine[c] + __popc(below)] = i;
    __syncwarp();
    if (c >= 0 && below == 0)
      mine[c] += __popc(same);
  });
  __syncthreads();
}

} // namespace oodk::cuda
