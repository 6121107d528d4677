// CUDA kernels of the ROC ops: scores to order-preserving keys, and the sums over two sorted key
// arrays. Kernels see raw pointers and no torch header; they use threads, blocks and shared memory.
//
// Sums: a thread owns a chunk of whole levels (common/exact_sums.h), finds it by binary search and walks
// it; a block adds its threads' sums as a tree, and one more block adds the blocks' in order. The
// integers are those of the CPU; areas differ from it in rounding only.
#pragma once

#include "common/exact_sums.h"
#include "common/order_key.h"
#include "cuda/common.cuh"

namespace oodk::cuda {

constexpr int kRocThreads = 128; // of a block: their sums take 14 KiB of shared memory
constexpr size_t kRocShared = kRocThreads * sizeof(RocSums); // bytes, of a block that sums

template <typename Key>
__global__ void make_keys(
    const Key* scores, int64_t n, int64_t stride, int64_t inf_bits, Key* keys) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
    keys[i] = order_key_nan_last(std::make_unsigned_t<Key>(scores[i * stride]), inf_bits);
}

template <typename Key>
__device__ inline RocSums sums_of_chunk(
    const Key* id, int64_t n, const Key* ood, int64_t m, int64_t chunk, int64_t size) {
  const RocChunk range = chunk_at(id, n, ood, m, chunk, size);
  RocSums sums{};
  RocPoint at = range.begin;
  while (at.i < range.end.i || at.j < range.end.j) {
    const bool from_id = at.j >= range.end.j || (at.i < range.end.i && id[at.i] <= ood[at.j]);
    const Key key = from_id ? id[at.i] : ood[at.j];
    RocPoint next = at;
    while (next.i < range.end.i && id[next.i] == key)
      ++next.i;
    while (next.j < range.end.j && ood[next.j] == key)
      ++next.j;
    add_level(sums, at, next, n, m);
    at = next;
  }
  add_level(sums, range.end, range.after, n, m);
  return sums;
}

// Adds the sums of the block's threads, as a tree; thread 0 returns them all.
__device__ inline RocSums sums_of_block(const RocSums& own) {
  extern __shared__ uint4 shared[];
  RocSums* const all = (RocSums*)shared;
  all[threadIdx.x] = own;
  __syncthreads();
  for (int half = kRocThreads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half)
      add_sums(all[threadIdx.x], all[threadIdx.x + half]);
    __syncthreads();
  }
  return all[0];
}

// partial[block]: the sums of kRocThreads chunks of `size` scores.
template <typename Key>
__global__ void sum_chunks(
    const Key* id, int64_t n, const Key* ood, int64_t m, int64_t size, RocSums* partial) {
  const int64_t chunk = int64_t(blockIdx.x) * kRocThreads + threadIdx.x;
  const bool any = chunk * size < n + m;
  const RocSums sums = sums_of_block(any ? sums_of_chunk(id, n, ood, m, chunk, size) : RocSums{});
  if (threadIdx.x == 0)
    partial[blockIdx.x] = sums;
}

// One block: thread t adds the t-th run of the partial sums.
static __global__ void sum_blocks(
    const RocSums* partial, int64_t blocks, int64_t n, int64_t m, int64_t* counts, double* areas) {
  const int64_t each = (blocks + kRocThreads - 1) / kRocThreads;
  const int64_t begin = threadIdx.x * each, end = begin + each < blocks ? begin + each : blocks;
  RocTotal total{};
  for (int64_t b = begin; b < end; ++b)
    total.add(partial[b]);
  const RocSums sums = sums_of_block(total.value());
  if (threadIdx.x == 0)
    write_sums(sums, n, m, counts, areas);
}

} // namespace oodk::cuda
