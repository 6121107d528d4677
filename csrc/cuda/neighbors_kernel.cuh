// The k nearest rows of a bank: the contract is that of ops/neighbors.h.
//
// A chunk of the queries meets the bank piece by piece, two launches each: all distances of the
// piece, from differences, in memory of bounded size, then a block a query that merges those below
// its k-th distance into the k least so far. A tile of 64 queries and 64 bank rows is 256 threads
// with 4 x 4 sums each; an entry is the sum over the features in their order, so it has the same
// bits in any tile. What is kept is sorted by distance and row, of which no two are equal: the order
// of threads, chunks and pieces changes nothing.
#pragma once

#include "cuda/kmeans/points.cuh"

namespace oodk::cuda {

struct NeighborInput {
  const void *queries, *bank;
  DType query_type, bank_type; // both float64, or neither
  int64_t count, n; // queries, bank rows
  int64_t query_stride, bank_stride;
  int d, k;
  bool normalize;
  int chunk = 1024, piece = 1 << 15; // queries and bank rows at a time, for tests to set
};

constexpr int kPairThreads = 256, kPairSide = 64, kPairDepth = 16;

// out[q * pitch + i] for the queries [0, count) and the bank rows [0, n): NaN for a row left out.
template <typename A, typename B, typename T = acc_t<A>>
__global__ void __launch_bounds__(kPairThreads) pair_distances(
    Points<A> queries, Points<B> bank, int count, int n, bool normalize, int pitch, T* out) {
  constexpr int each = kPairSide / 16; // rows and columns of a thread
  __shared__ T a[kPairDepth][kPairSide + 1], b[kPairDepth][kPairSide + 1];
  const int tiles = (n + kPairSide - 1) / kPairSide;
  const int first_query = int(blockIdx.x / unsigned(tiles)) * kPairSide;
  const int first_row = int(blockIdx.x % unsigned(tiles)) * kPairSide;
  const int x = int(threadIdx.x) % 16, y = int(threadIdx.x) / 16;
  const auto value = [&](const auto& points, int row, int rows, int j) {
    return row < rows && j < points.d
        ? points.value(points.data(row)[j], normalize ? points.factor(row) : T(1), T(0))
        : T(0);
  };
  T sum[each][each] = {};
  for (int first = 0; first < queries.d; first += kPairDepth) {
#pragma unroll
    for (int i = y; i < kPairSide; i += 16) { // 16 threads read adjacent features of a row
      a[x][i] = value(queries, first_query + i, count, first + x);
      b[x][i] = value(bank, first_row + i, n, first + x);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPairDepth; ++j)
#pragma unroll
      for (int m = 0; m < each; ++m)
#pragma unroll
        for (int c = 0; c < each; ++c) {
          const T difference = a[j][y + 16 * m] - b[j][x + 16 * c];
          sum[m][c] += difference * difference;
        }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < each; ++m)
#pragma unroll
    for (int c = 0; c < each; ++c) {
      const int q = first_query + y + 16 * m, row = first_row + x + 16 * c;
      if (q < count && row < n) {
        const T scale = bank.scale[row];
        out[int64_t(q) * pitch + row] = scale == scale ? sum[m][c] : kNaN<T>;
      }
    }
}

// A row of the bank and its distance, of which less is nearer; no row where there is none yet.
constexpr int64_t kNoRow = std::numeric_limits<int64_t>::max();

template <typename T>
__device__ inline bool is_nearer(T distance, int64_t row, T than, int64_t than_row) {
  return distance < than || (distance == than && row < than_row);
}

// How many of n sorted neighbours are nearer.
template <typename T>
__device__ inline int count_nearer(
    const T* distance, const int64_t* row, int n, T than, int64_t than_row) {
  int begin = 0, end = n;
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (is_nearer(distance[middle], row[middle], than, than_row))
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// The k least so far of each query, sorted: (queries, k), and as much to merge into.
template <typename T>
struct Kept {
  T* distance;
  int64_t* row;
  T* next_distance;
  int64_t* next_row;
  int k;

  __device__ Kept of(int64_t query) const {
    return {
        distance + query * k, row + query * k, next_distance + query * k, next_row + query * k, k};
  }
};

constexpr int kKeepThreads = 256, kHeld = 1024; // a power of two

template <typename T>
struct Held {
  T distance[kHeld];
  int64_t row[kHeld];
};

// For whole blocks: merges the first `count` of those held, in any order, into those kept.
template <typename T>
__device__ inline void merge_held(Held<T>& held, int count, const Kept<T>& kept) {
  int size = 1;
  while (size < count)
    size *= 2;
  for (int i = count + int(threadIdx.x); i < size; i += int(blockDim.x)) {
    held.distance[i] = kInf<T>;
    held.row[i] = kNoRow;
  }
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) // bitonic
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = int(threadIdx.x); i < size; i += int(blockDim.x)) {
        const int other = i ^ step;
        const bool ascending = (i & run) == 0;
        if (other > i &&
            is_nearer(held.distance[other], held.row[other], held.distance[i], held.row[i]) ==
                ascending) {
          const T distance = held.distance[i];
          const int64_t row = held.row[i];
          held.distance[i] = held.distance[other];
          held.row[i] = held.row[other];
          held.distance[other] = distance;
          held.row[other] = row;
        }
      }
      __syncthreads();
    }
  const auto place = [&](T distance, int64_t row, int64_t at) {
    if (at < kept.k) {
      kept.next_distance[at] = distance;
      kept.next_row[at] = row;
    }
  };
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x))
    place(held.distance[i], held.row[i],
        int64_t(i) + count_nearer(kept.distance, kept.row, kept.k, held.distance[i], held.row[i]));
  for (int i = int(threadIdx.x); i < kept.k; i += int(blockDim.x))
    place(kept.distance[i], kept.row[i],
        int64_t(i) + count_nearer(held.distance, held.row, count, kept.distance[i], kept.row[i]));
  __syncthreads();
  for (int i = int(threadIdx.x); i < kept.k; i += int(blockDim.x)) {
    kept.distance[i] = kept.next_distance[i];
    kept.row[i] = kept.next_row[i];
  }
  __syncthreads();
}

// A block a query: distances (queries, pitch) of the bank rows first .. first + n - 1, of which the
// first piece begins what is kept and the last one ends it. `scale`: of the queries.
template <typename T>
__global__ void __launch_bounds__(kKeepThreads) keep_nearest(const T* distances, int pitch, int n,
    int64_t first, const T* scale, bool begins, bool ends, Kept<T> of_all) {
  __shared__ Held<T> held;
  const Kept<T> kept = of_all.of(blockIdx.x);
  distances += int64_t(blockIdx.x) * pitch;
  if (begins)
    for (int i = int(threadIdx.x); i < kept.k; i += int(blockDim.x)) {
      kept.distance[i] = kInf<T>;
      kept.row[i] = kNoRow;
    }
  __syncthreads();
  int count = 0;
  for (int at = 0; at < n; at += int(blockDim.x)) {
    const T kth = kept.distance[kept.k - 1];
    const int64_t kth_row = kept.row[kept.k - 1];
    const int i = at + int(threadIdx.x);
    const T distance = i < n ? distances[i] : kNaN<T>;
    const bool nearer = is_nearer(distance, first + i, kth, kth_row);
    int total;
    const int place = count + block_exclusive_scan(nearer, total);
    if (nearer) {
      held.distance[place] = distance;
      held.row[place] = first + i;
    }
    count += total;
    if (count > 0 && (count + int(blockDim.x) > kHeld || at + int(blockDim.x) >= n)) {
      merge_held(held, count, kept);
      count = 0;
    }
  }
  if (!ends)
    return;
  __syncthreads();
  const bool left_out = scale[blockIdx.x] != scale[blockIdx.x];
  for (int i = int(threadIdx.x); i < kept.k; i += int(blockDim.x))
    if (left_out || kept.row[i] == kNoRow) {
      kept.distance[i] = kNaN<T>;
      kept.row[i] = -1;
    }
}

// As scale_rows(): NaN for a row of the bank that is left out. scale: (n,), double for float64.
inline void bank_scales(const Launches& on, const NeighborInput& in, void* scale) {
  dispatch(in.bank_type, [&](auto b) {
    using B = decltype(b);
    on.run(scale_rows<B>, on.blocks(1, in.n), kPointThreads, 0,
        Points<B>{(const B*)in.bank, in.n, in.bank_stride, in.d, 0}, in.n, in.normalize,
        (acc_t<B>*)scale);
  });
}

// distances, indices: (queries, k). bank_scale: as bank_scales() left it.
inline void nearest_neighbors(const Launches& on, const NeighborInput& in, const void* bank_scale,
    void* distances, int64_t* indices) {
  dispatch(in.query_type, [&](auto a) {
    dispatch(in.bank_type, [&](auto b) {
      using A = decltype(a);
      using B = decltype(b);
      using T = acc_t<A>;
      if constexpr (std::is_same_v<T, acc_t<B>>) {
        const int64_t chunk = std::min<int64_t>(in.chunk, in.count);
        const int piece = int(std::min<int64_t>(in.piece, in.n));
        T* const scale = on.scratch.array<T>(in.count);
        T* const pairs = on.scratch.array<T>(chunk * piece);
        T* const next_distance = on.scratch.array<T>(chunk * in.k);
        int64_t* const next_row = on.scratch.array<int64_t>(chunk * in.k);
        Points<A> x{(const A*)in.queries, in.count, in.query_stride, in.d, 0, scale};
        on.run(scale_rows<A>, on.blocks(1, in.count), kPointThreads, 0, x, in.count, in.normalize,
            scale);
        for (int64_t q = 0; q < in.count; q += chunk) {
          const int queries = int(std::min(chunk, in.count - q));
          x.x = (const A*)in.queries + q * in.query_stride;
          x.scale = scale + q;
          for (int64_t first = 0; first < in.n; first += piece) {
            const int n = int(std::min<int64_t>(piece, in.n - first));
            const Points<B> rows{(const B*)in.bank + first * in.bank_stride, n, in.bank_stride,
                in.d, 0, (const T*)bank_scale + first};
            on.run(pair_distances<A, B, T>,
                whole_blocks(queries, kPairSide) * whole_blocks(n, kPairSide), kPairThreads, 0, x,
                rows, queries, n, in.normalize, piece, pairs);
            on.run(keep_nearest<T>, queries, kKeepThreads, 0, pairs, piece, n, first, scale + q,
                first == 0, first + n == in.n,
                Kept<T>{
                    (T*)distances + q * in.k, indices + q * in.k, next_distance, next_row, in.k});
          }
        }
      }
    });
  });
}

} // namespace oodk::cuda
