// Selection of rows by cluster and score on CUDA: the contract is that of ops/dos.h.
//
// cluster_argmax: rows are sorted by cluster (a stable counting sort, a block a problem); then
// every row counts the better rows of its cluster, which is its place, and gives up after m. With n
// rows in a cluster that takes about m n log n comparisons, out of the caches.
//
// Selection, a block a problem: clusters get places in the output by a scan. The fill takes the
// rows with the least random numbers: a radix select finds the greatest of these, 8 bits at a time,
// and the few that remain are ranked by comparing all with all.
#pragma once

#include "common/philox.h"
#include "cuda/block.cuh"
#include "cuda/launches.cuh"

namespace oodk::cuda {

// (problems, n), `stride` values from problem to problem; as at() has it, one problem's.
template <typename S>
struct Scores {
  const S* values;
  int64_t stride;

  __device__ Scores at(int64_t b) const {
    return {values + b * stride, stride};
  }
  __device__ acc_t<S> operator[](int64_t row) const { // NaN counts as -inf
    const acc_t<S> score = widen(values[row]);
    return score == score ? score : -kInf<acc_t<S>>;
  }
  // Whether row i goes before row j.
  __device__ bool better(acc_t<S> of_i, int i, int j) const {
    const acc_t<S> of_j = (*this)[j];
    return of_i > of_j || (of_i == of_j && i < j);
  }
};

// Rows by cluster: those of cluster c are order[start[c]] .. order[start[c + 1] - 1], ascending.
struct Clusters {
  const int64_t* label; // (problems, n); outside 0..k-1: in no cluster
  int n, k;
  int *order, *start, *histogram; // (problems, n), (problems, k + 1), see block.cuh

  __device__ Clusters at(int64_t b) const {
    return {label + b * n, n, k, order + b * n, start + b * (k + 1),
        histogram + b * Histogram::size(int(blockDim.x), k)};
  }
};

// A block a problem.
static __global__ void sort_rows(Clusters all) {
  const Clusters clusters = all.at(blockIdx.x);
  const Histogram table{clusters.histogram, clusters.k};
  const auto label = [=](int i) { return clusters.label[i]; };
  count_members(clusters.n, table, label);
  place_clusters(table, clusters.start);
  place_members(clusters.n, table, label, clusters.order);
}

// best (problems, k, m): the rows of the m best scores of each cluster, -1 where there are fewer.
// `blocks` blocks a problem.
template <typename S>
__global__ void rank_rows(Clusters all, Scores<S> scores, int m, int64_t* best, int blocks) {
  const int64_t b = blockIdx.x / blocks;
  const Clusters clusters = all.at(b);
  const Scores<S> score = scores.at(b);
  best += b * clusters.k * int64_t(m);
  const int64_t first = int64_t(blockIdx.x % blocks) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(blocks) * blockDim.x;
  for (int64_t p = first; p < clusters.start[clusters.k]; p += step) {
    const int row = clusters.order[p], c = int(clusters.label[row]);
    const acc_t<S> own = score[row];
    int place = 0;
    for (int q = clusters.start[c]; q < clusters.start[c + 1] && place < m; ++q)
      place += clusters.order[q] != row && !score.better(own, row, clusters.order[q]);
    if (place < m)
      best[int64_t(c) * m + place] = row;
  }
  for (int64_t e = first; e < clusters.k * int64_t(m); e += step) {
    const int c = int(e / m);
    if (e % m >= clusters.start[c + 1] - clusters.start[c])
      best[e] = -1;
  }
}

// Which of the best rows are selected, and what else.
struct Choice {
  int k, m, n_select;
  int visited; // clusters 0..visited-1 are
  bool best_clusters; // only those n_select clusters whose best rows are the best
  uint64_t seed;
};

struct ChoiceScratch { // (problems, .)
  unsigned char* taken; // n
  int *offset, *list; // k, n
  uint64_t* bits; // n

  __device__ ChoiceScratch at(int64_t b, int n, int k) const {
    return {taken + b * n, offset + b * k, list + b * n, bits + b * n};
  }
};

// The `wanted`-th least of bits[i], i < n with in(i), of which there are as many. For a block.
template <typename In>
__device__ inline uint64_t nth_least(const uint64_t* bits, int n, int wanted, const In& in) {
  __shared__ int counts[256];
  __shared__ int digit, before;
  uint64_t prefix = 0, known = 0; // bits that are, and which
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int d = int(threadIdx.x); d < 256; d += int(blockDim.x))
      counts[d] = 0;
    __syncthreads();
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x))
      if (in(i) && (bits[i] & known) == prefix)
        atomicAdd(&counts[bits[i] >> shift & 255], 1);
    __syncthreads();
    int below = 0;
    for (int first = 0; first < 256; first += int(blockDim.x)) {
      const int d = first + int(threadIdx.x), count = d < 256 ? counts[d] : 0;
      int total;
      const int up_to = below + block_exclusive_scan(count, total);
      below += total;
      if (up_to < wanted && wanted <= up_to + count) {
        digit = d;
        before = up_to;
      }
    }
    __syncthreads();
    wanted -= before;
    prefix |= uint64_t(digit) << shift;
    known |= uint64_t(255) << shift;
    __syncthreads();
  }
  return prefix;
}

// selected (problems, n_select), from best (problems, k, m) of rank_rows(). A block a problem.
template <typename S>
__global__ void select_rows(Clusters all, Scores<S> scores, Choice how, ChoiceScratch scratch,
    const int64_t* best, int64_t* selected) {
  const int64_t b = blockIdx.x;
  const Clusters clusters = all.at(b);
  const Scores<S> score = scores.at(b);
  const auto [taken, offset, list, bits] = scratch.at(b, clusters.n, clusters.k);
  best += b * how.k * int64_t(how.m);
  selected += b * how.n_select;
  const int n = clusters.n, thread = int(threadIdx.x), threads = int(blockDim.x);
  const auto size = [&](int c) { return clusters.start[c + 1] - clusters.start[c]; };

  for (int i = thread; i < n; i += threads)
    taken[i] = 0;
  int count = 0;
  for (int first = 0; first < how.visited; first += threads) {
    const int c = first + thread;
    int kept = c < how.visited ? min(size(c), how.m) : 0;
    if (kept > 0 && how.best_clusters) {
      const int row = int(best[c]); // m is 1
      const acc_t<S> own = score[row];
      int better = 0;
      for (int other = 0; other < how.k && better < how.n_select; ++other)
        if (other != c && size(other) > 0) {
          const acc_t<S> theirs = score[best[other]];
          better += theirs > own || (theirs == own && other < c);
        }
      kept = better < how.n_select;
    }
    int total;
    const int at = count + block_exclusive_scan(kept, total);
    count += total;
    if (c < how.visited)
      offset[c] = kept ? at : -1;
  }
  __syncthreads();
  for (int64_t e = thread; e < how.visited * int64_t(how.m); e += threads) {
    const int c = int(e / how.m), place = int(e % how.m);
    if (offset[c] >= 0 && place < size(c)) {
      selected[offset[c] + place] = best[e];
      taken[best[e]] = 1;
    }
  }
  __syncthreads();

  const auto other = [&](int i) { return clusters.label[i] >= 0 && !taken[i]; };
  int others = 0;
  if (count < how.n_select)
    for (int i = thread; i < n; i += threads)
      if (other(i)) {
        bits[i] = random_bits(how.seed, Stream::fill, 0, 0, uint32_t(i));
        ++others;
      }
  int all_others;
  block_exclusive_scan(others, all_others);
  const int fill = min(how.n_select - count, all_others);
  if (fill > 0) {
    const uint64_t most = nth_least(bits, n, fill, other);
    __shared__ int listed;
    if (thread == 0)
      listed = 0;
    __syncthreads();
    for (int i = thread; i < n; i += threads)
      if (other(i) && bits[i] <= most)
        list[atomicAdd(&listed, 1)] = i;
    __syncthreads();
    for (int p = thread; p < listed; p += threads) {
      const int row = list[p];
      int place = 0;
      for (int q = 0; q < listed; ++q)
        place += bits[list[q]] < bits[row] || (bits[list[q]] == bits[row] && list[q] < row);
      if (place < fill)
        selected[count + place] = row;
    }
  }
  for (int i = count + fill + thread; i < how.n_select; i += threads)
    selected[i] = -1;
}

// --- host ----------------------------------------------------------------------------------------

// Labels and scores of `problems` problems of n rows.
struct SelectionInput {
  const int64_t* label;
  const void* scores;
  DType dtype;
  int64_t problems, n, stride;
};

inline Clusters sorted_by_cluster(const Launches& on, const SelectionInput& in, int k) {
  const Clusters clusters{in.label, int(in.n), k, on.scratch.array<int>(in.problems * in.n),
      on.scratch.array<int>(in.problems * (k + 1)),
      on.scratch.array<int>(in.problems * Histogram::size(on.threads, k))};
  on.run(sort_rows, in.problems, on.threads, 0, clusters);
  return clusters;
}

template <typename S>
void rank(
    const Launches& on, const SelectionInput& in, const Clusters& clusters, int m, int64_t* best) {
  const int64_t items = std::max(in.n, clusters.k * int64_t(m));
  const int blocks = on.blocks(in.problems, whole_blocks(items, kWarp));
  on.run(rank_rows<S>, in.problems * blocks, on.threads, 0, clusters,
      Scores<S>{(const S*)in.scores, in.stride}, m, best, blocks);
}

// best (problems, k, m)
inline void cluster_argmax(
    const Launches& on, const SelectionInput& in, int k, int m, int64_t* best) {
  const Clusters clusters = sorted_by_cluster(on, in, k);
  dispatch(in.dtype, [&](auto s) { rank<decltype(s)>(on, in, clusters, m, best); });
  on.scratch.release();
}

// selected (problems, n_select)
inline void select(
    const Launches& on, const SelectionInput& in, const Choice& how, int64_t* selected) {
  const Clusters clusters = sorted_by_cluster(on, in, how.k);
  int64_t* const best = on.scratch.array<int64_t>(in.problems * how.k * how.m);
  const ChoiceScratch scratch{on.scratch.array<unsigned char>(in.problems * in.n),
      on.scratch.array<int>(in.problems * how.k), on.scratch.array<int>(in.problems * in.n),
      on.scratch.array<uint64_t>(in.problems * in.n)};
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    rank<S>(on, in, clusters, how.m, best);
    on.run(select_rows<S>, in.problems, on.threads, 0, clusters,
        Scores<S>{(const S*)in.scores, in.stride}, how, scratch, best, selected);
  });
  on.scratch.release();
}

} // namespace oodk::cuda
