// Points of K-means, and their products with other points, tile by tile.
//
// A tile of 16 M points meets a tile of 16 N others: 256 threads with M x N accumulators each,
// operands staged feature-major in shared memory, 8 features at a time, the next ones already on
// their way in registers. Values are widened and scaled as they are staged, so x may have any type,
// stride and alignment, and normalised points need no memory. An entry is the sum over the features
// in their order, one fused multiply-add each, in float32 or float64: the same bits in any tile,
// whatever torch's setting for matrix products.
//
// Per tile and feature: 256 M N multiply-adds for 16 (M + N) values read. With M = N = 8 in float32
// a multiprocessor that does 128 of them a clock reads 8 B of L2 a clock and a thread loads four
// times 16 bytes of shared memory for 64 of them; a quarter of a warp's loads are broadcasts, none
// conflict.
#pragma once

#include "common/frame.h"
#include "common/seeding.h"
#include "cuda/block.cuh"
#include "cuda/launches.cuh"

namespace oodk::cuda {

// The points of many problems; at(b) are those of problem b.
template <typename S>
struct Points {
  using T = acc_t<S>;

  const S* x; // (problems, rows) rows of d values, `stride` values apart
  int64_t rows, stride;
  int d, capacity; // most points of a problem
  const T* scale = nullptr; // (problems, rows): what a row is multiplied with, see value(); null: 1
  const int* ids = nullptr; // (problems, capacity): rows of the points; null for 0, 1, 2 ...
  const int* count = nullptr; // (problems,); null for capacity
  const T* center = nullptr; // (problems, d): what is subtracted then; null for 0

  __device__ Points at(int64_t b) const {
    Points p = *this;
    p.x += b * rows * stride;
    p.scale = scale ? scale + b * rows : nullptr;
    p.ids = ids ? ids + b * capacity : nullptr;
    p.count = count ? count + b : nullptr;
    p.center = center ? center + b * d : nullptr;
    return p;
  }
  __device__ int size() const {
    return count ? *count : capacity;
  }
  __device__ int row(int i) const {
    return ids ? ids[i] : i;
  }
  __device__ const S* data(int row) const {
    return x + row * stride;
  }
  __device__ T factor(int row) const {
    return scale ? scale[row] : T(1);
  }
  __device__ T center_at(int j) const {
    return center && j < d ? center[j] : T(0);
  }
  // Of a value in memory: a factor below 0 is more than a number holds (common/frame.h).
  static __device__ T value(S x, T factor, T center) {
    return (factor < 0 ? widen(x) * kBoost<T> * -factor : widen(x) * factor) - center;
  }
};

// --- preparation ---------------------------------------------------------------------------------

__device__ inline float root(float x) {
  return sqrtf(x);
}
__device__ inline double root(double x) {
  return sqrt(x);
}

// |x|^2, or 1 / |x| with `normalize` (1 for a zero row); NaN for a row that is left out.
template <typename S>
__device__ inline acc_t<S> scale_of(const S* x, int d, bool normalize) {
  using T = acc_t<S>;
  constexpr double most = std::numeric_limits<T>::max();
  const auto sum_of_squares = [=](double unit) {
    double sum = 0;
    for (int j = lane_id(); j < d; j += kWarp) {
      const double value = double(widen(x[j])) / unit;
      sum += value * value;
    }
    return warp_sum(sum);
  };
  double norm2 = sum_of_squares(1), unit = 1;
  if constexpr (std::is_same_v<T, double>) {
    if (normalize && !(norm2 > 1e-290 && norm2 <= most)) { // squares may have been lost
      double largest = 0;
      for (int j = lane_id(); j < d; j += kWarp)
        largest = larger_or_nan(largest, fabs(x[j]));
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2)
        largest = larger_or_nan(largest, __shfl_xor_sync(kAllLanes, largest, step));
      unit = largest > 0 && largest <= most ? largest : 1;
      norm2 = sum_of_squares(unit);
    }
  }
  // The float64 sum of squares of finite floats is finite; as they are, their float sum must be,
  // too.
  const double limit = normalize ? std::numeric_limits<double>::max() : most;
  if (!(norm2 <= limit))
    return kNaN<T>;
  if (!normalize)
    return T(norm2);
  const double inverse = norm2 > 0 ? 1 / sqrt(norm2) : 1;
  return inverse / unit <= most ? T(inverse / unit) : -T(inverse / (unit * kBoost<double>));
}

// A warp a row of all problems.
template <typename S>
__global__ void __launch_bounds__(kPointThreads)
    scale_rows(Points<S> x, int64_t rows, bool normalize, acc_t<S>* scale) {
  const int64_t step = int64_t(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t r = int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp_id(); r < rows; r += step) {
    const acc_t<S> found = scale_of(x.x + r * x.stride, x.d, normalize);
    if (lane_id() == 0)
      scale[r] = found;
  }
}

// A block a problem: the rows that are not left out, in order, and their number. The others get the
// label -1, where `labels` (problems, n) is given.
template <typename T>
__global__ void list_valid_rows(const T* scale, int n, int* ids, int* count, int64_t* labels) {
  const int64_t b = blockIdx.x;
  scale += b * n;
  ids += b * n;
  constexpr int each = 4; // rows of a thread at a time
  int before = 0;
  for (int64_t first = 0; first < n; first += each * int(blockDim.x)) {
    const int64_t mine = first + each * int(threadIdx.x);
    bool valid[each];
    int found = 0, total;
#pragma unroll
    for (int e = 0; e < each; ++e) {
      valid[e] = mine + e < n && scale[mine + e] == scale[mine + e];
      found += valid[e];
    }
    int at = before + block_exclusive_scan(found, total);
    before += total;
#pragma unroll
    for (int e = 0; e < each; ++e)
      if (valid[e])
        ids[at++] = int(mine) + e;
      else if (labels && mine + e < n)
        labels[b * n + mine + e] = -1;
  }
  if (threadIdx.x == 0)
    count[b] = before;
}

// A block a problem: those of x, or of more than `limit` a stratified random sample.
template <typename S>
__global__ void sample_points(
    Points<S> x, int limit, int least, int k, uint64_t seed, int capacity, int* ids, int* count) {
  const Points<S> points = x.at(blockIdx.x);
  const int n = points.size();
  const int wanted = n > limit ? int(seeding_sample(n, k, least)) : n;
  ids += int64_t(blockIdx.x) * capacity;
  for (int j = int(threadIdx.x); j < wanted; j += int(blockDim.x)) {
    const uint64_t bits = random_bits(seed, Stream::sample, 0, 0, uint32_t(j));
    ids[j] = points.row(n > limit ? stratified(n, wanted, j, bits) : j);
  }
  if (threadIdx.x == 0)
    count[blockIdx.x] = wanted;
}

// A block for each 32 features of a problem: the means (problems, d) and the sum of squared
// differences from them.
template <typename S>
__global__ void sum_deviations(Points<S> x, double* means, double* sums) {
  __shared__ double part[kWarp][kWarp + 1];
  const int groups = (x.d + kWarp - 1) / kWarp, warps = int(blockDim.x) / kWarp;
  const int64_t b = blockIdx.x / groups;
  const Points<S> points = x.at(b);
  const int n = points.size(), j = int(blockIdx.x) % groups * kWarp + lane_id();
  double mean = 0, sum = 0;
  for (int round = 0; round < 2; ++round) {
    double own = 0;
    if (j < x.d)
#pragma unroll 4
      for (int i = warp_id(); i < n; i += warps) {
        const int row = points.row(i);
        const double value =
            double(points.value(points.data(row)[j], points.factor(row), points.center_at(j))) -
            mean;
        own += round ? value * value : value;
      }
    part[warp_id()][lane_id()] = own;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < warps; ++w)
      sum += part[w][lane_id()];
    if (round == 0)
      mean = n ? sum / n : 0;
    __syncthreads();
  }
  if (warp_id() == 0 && j < x.d)
    means[b * x.d + j] = mean;
  sum = warp_sum(sum);
  if (threadIdx.x == 0)
    sums[blockIdx.x] = sum;
}

// A block a problem: the unit, as `given` or as the squared norms (problems, n) of its rows ask for,
// which becomes the scale of each; NaN, for a row that is left out, stays.
template <typename T>
__global__ void choose_units(T* scale, int64_t n, const T* given, T* unit) {
  const int64_t b = blockIdx.x;
  scale += b * n;
  T largest = 0;
  for (int64_t i = threadIdx.x; i < n && !given; i += blockDim.x)
    largest = larger(largest, scale[i]);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, step));
  __shared__ T of_warp[kWarp];
  if (lane_id() == 0)
    of_warp[warp_id()] = largest;
  __syncthreads();
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w)
    largest = larger(largest, of_warp[w]);
  const T own = given ? given[b] : frame_unit(largest);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
    scale[i] = scale[i] == scale[i] ? own : scale[i];
  if (unit && threadIdx.x == 0)
    unit[b] = own;
}

// A block a problem: its center (problems, d), 0 or its mean, from sum_deviations().
template <typename T>
__global__ void choose_centers(
    const double* means, const double* deviations, const int* count, int d, T* center) {
  const int64_t b = blockIdx.x;
  const int groups = (d + kWarp - 1) / kWarp;
  means += b * d;
  double norm2 = 0, variance = 0;
  for (int j = int(threadIdx.x); j < d; j += int(blockDim.x))
    norm2 += means[j] * means[j];
  for (int g = int(threadIdx.x); g < groups; g += int(blockDim.x))
    variance += deviations[b * groups + g];
  norm2 = block_sum(norm2);
  variance = block_sum(variance);
  const bool far = count[b] > 0 && is_far(norm2, variance / count[b]);
  for (int j = int(threadIdx.x); j < d; j += int(blockDim.x))
    center[b * d + j] = far ? T(means[j]) : T(0);
}

// norm2 (problems, capacity), a thread a point: the bits of the point's product with itself.
template <typename S>
__global__ void __launch_bounds__(kPointThreads)
    square_norms(Points<S> x, int64_t problems, acc_t<S>* norm2) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= problems * x.capacity)
    return;
  const Points<S> points = x.at(t / x.capacity);
  const int i = int(t % x.capacity);
  if (i >= points.size())
    return;
  const int row = points.row(i);
  acc_t<S> sum = 0;
  for (int j = 0; j < x.d; ++j) {
    const acc_t<S> value =
        points.value(points.data(row)[j], points.factor(row), points.center_at(j));
    sum += value * value;
  }
  norm2[t] = sum;
}

// What a centroid adds to a point's products with it: -|c|^2 / 2, so that the nearest has the
// greatest sum; -inf for one that nothing is nearest to.
template <typename T>
__device__ inline T bias_of(T norm2) {
  return norm2 <= std::numeric_limits<T>::max() ? -norm2 / 2 : -kInf<T>;
}

// placed = centroids, both (problems, k, d), where problems with these units and centers (null for 1
// and 0) are solved; bias (problems, k). A warp a centroid.
template <typename T>
__global__ void __launch_bounds__(kPointThreads) place_rows(const T* centroids, int64_t count,
    int k, int d, const T* unit, const T* center, T* placed, T* bias) {
  const int64_t c = int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp_id();
  if (c >= count)
    return;
  const int64_t b = c / k;
  const T own = unit ? unit[b] : T(1);
  T norm2 = 0;
  for (int j = lane_id(); j < d; j += kWarp) {
    const T value = centroids[c * d + j] * own - (center ? center[b * d + j] : T(0));
    placed[c * d + j] = value;
    norm2 += value * value;
  }
  norm2 = warp_sum(norm2);
  if (lane_id() == 0)
    bias[c] = bias_of(norm2);
}

// --- tiles ---------------------------------------------------------------------------------------

constexpr int kTileThreads = 256, kTileSide = 16; // threads along either side

template <typename A, typename B, int M, int N>
struct Tile {
  using T = acc_t<A>;
  static_assert(std::is_same_v<T, acc_t<B>>);
  static constexpr int kUnit = kPerUnit<T>; // values of 16 bytes
  static constexpr int kDepth = 8; // features at a time: 32 bytes, a sector of memory, in float32
  static constexpr int kRows = kTileSide * M, kColumns = kTileSide * N;

  struct Shared {
    alignas(uint4) T a[2][kDepth][kRows + kUnit];
    alignas(uint4) T b[2][kDepth][kColumns + kUnit];
    T scale_a[kRows], scale_b[kColumns];
    int row_a[kRows], row_b[kColumns]; // -1 past the last
    T best[kRows]; // of the columns so far, for assign()
    int found[kRows]; // where that is
  };

  Points<A> a;
  Points<B> b;
  Shared& shared;
  int x = int(threadIdx.x) % kTileSide, y = int(threadIdx.x) / kTileSide;

  // Of this thread's m-th row and n-th column.
  __device__ int row(int m) const {
    return y * M + m;
  }
  __device__ int column(int n) const {
    return n / kUnit * (kTileSide * kUnit) + x * kUnit + n % kUnit;
  }

  template <int Count, typename P>
  static __device__ void choose(const P& points, int first, int (&row)[Count], T (&scale)[Count]) {
    const int n = points.size();
    for (int i = int(threadIdx.x); i < Count; i += kTileThreads) {
      row[i] = first + i < n ? points.row(first + i) : -1;
      scale[i] = row[i] < 0 ? T(0) : points.factor(row[i]);
    }
  }
  // Which points are meant; a barrier must follow.
  __device__ void choose_rows(int first) {
    choose(a, first, shared.row_a, shared.scale_a);
  }
  __device__ void choose_columns(int first) {
    choose(b, first, shared.row_b, shared.scale_b);
  }

  // Values of a slab of kDepth features that a thread brings: all of the same feature.
  static constexpr int kStep = kTileThreads / kDepth;
  template <int Count, typename S>
  static __device__ void fetch(
      const Points<S>& points, int first, const int (&row)[Count], S (&to)[Count / kStep]) {
    const int j = first + int(threadIdx.x) % kDepth;
#pragma unroll
    for (int i = 0; i < Count / kStep; ++i) {
      const int r = row[int(threadIdx.x) / kDepth + i * kStep];
      to[i] = r >= 0 && j < points.d ? points.data(r)[j] : narrow<S>(0);
    }
  }
  template <int Count, int Pitch, typename S>
  static __device__ void put(
      const S (&from)[Count / kStep], T center, const T (&scale)[Count], T (&slab)[kDepth][Pitch]) {
#pragma unroll
    for (int i = 0; i < Count / kStep; ++i) {
      const int r = int(threadIdx.x) / kDepth + i * kStep;
      slab[int(threadIdx.x) % kDepth][r] =
          scale[r] != 0 ? Points<S>::value(from[i], scale[r], center) : T(0); // 0: no row
    }
  }
  template <int Count>
  static __device__ void load(const T* from, T* to) { // Count values, of whole units
#pragma unroll
    for (int u = 0; u < Count / kUnit; ++u) {
      const uint4 unit = ((const uint4*)from)[u];
      memcpy(to + u * kUnit, &unit, sizeof(unit));
    }
  }

  // sum[m][n] += row . column, of points chosen before; all reads of shared memory done at the end.
  __device__ void multiply(T (&sum)[M][N]) {
    A next_a[kRows / kStep];
    B next_b[kColumns / kStep];
    T center_a, center_b; // of the feature that this thread brings
    const auto fetch_both = [&](int first) {
      fetch(a, first, shared.row_a, next_a);
      fetch(b, first, shared.row_b, next_b);
      center_a = a.center_at(first + int(threadIdx.x) % kDepth);
      center_b = b.center_at(first + int(threadIdx.x) % kDepth);
    };
    const auto put_both = [&](int buffer) {
      put(next_a, center_a, shared.scale_a, shared.a[buffer]);
      put(next_b, center_b, shared.scale_b, shared.b[buffer]);
    };
    fetch_both(0);
    put_both(0);
    __syncthreads();
    int buffer = 0;
#pragma unroll 1
    for (int first = 0; first < a.d; first += kDepth, buffer ^= 1) {
      const bool more = first + kDepth < a.d;
      if (more)
        fetch_both(first + kDepth);
#pragma unroll
      for (int j = 0; j < kDepth; ++j) {
        T p[M], q[N];
        load<M>(&shared.a[buffer][j][row(0)], p);
#pragma unroll
        for (int u = 0; u < N; u += kUnit)
          load<kUnit>(&shared.b[buffer][j][column(u)], q + u);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < N; ++n)
            sum[m][n] += p[m] * q[n];
      }
      if (more)
        put_both(buffer ^ 1);
      __syncthreads();
    }
  }
};

// out (problems, a.capacity, pitch) = products of the points of a with those of b, zero up to
// pitch, which is a whole number of units. A block a tile.
template <typename A, typename B, int M, int N>
__global__ void __launch_bounds__(kTileThreads)
    multiply(Points<A> all_a, Points<B> all_b, int64_t pitch, acc_t<A>* out) {
  using Tiles = Tile<A, B, M, N>;
  using T = acc_t<A>;
  extern __shared__ uint4 shared[];
  const int across = int((pitch + Tiles::kColumns - 1) / Tiles::kColumns);
  const int down = (all_a.capacity + Tiles::kRows - 1) / Tiles::kRows;
  const int64_t problem = blockIdx.x / (int64_t(across) * down);
  const int tile = int(blockIdx.x % (int64_t(across) * down));
  const int first_row = tile / across * Tiles::kRows;
  const int first_column = tile % across * Tiles::kColumns;
  Tiles t{all_a.at(problem), all_b.at(problem), *(typename Tiles::Shared*)shared};
  const int n = t.a.size();
  if (first_row >= n)
    return;
  t.choose_rows(first_row);
  t.choose_columns(first_column);
  __syncthreads();
  T sum[M][N] = {};
  t.multiply(sum);
  out += problem * all_a.capacity * pitch;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int u = 0; u < N; u += Tiles::kUnit) {
      const int row = first_row + t.row(m), column = first_column + t.column(u);
      if (row < n && column < pitch) {
        uint4 unit;
        memcpy(&unit, &sum[m][u], sizeof(unit));
        *(uint4*)(out + row * pitch + column) = unit;
      }
    }
}

// State of a run of Lloyd's iteration.
struct RunStatus {
  int iterations, done;
};

// label (runs, x.capacity): the centroid nearest to each point, the lowest of equals, -1 for none.
// `restarts` runs share a problem; those that are done keep their labels. A block a tile of points.
template <typename S, int M, int N>
__global__ void __launch_bounds__(kTileThreads, M * N * sizeof(acc_t<S>) < 256 ? 2 : 1)
    assign(Points<S> x, Points<acc_t<S>> centroids, const acc_t<S>* bias, int restarts,
        const RunStatus* status, int* label) {
  using T = acc_t<S>;
  using Tiles = Tile<S, T, M, N>;
  extern __shared__ uint4 shared[];
  const int tiles = (x.capacity + Tiles::kRows - 1) / Tiles::kRows;
  const int64_t run = blockIdx.x / tiles;
  const int first_row = int(blockIdx.x % tiles) * Tiles::kRows;
  Tiles t{x.at(run / restarts), centroids.at(run), *(typename Tiles::Shared*)shared};
  const int n = t.a.size(), k = centroids.capacity;
  if (first_row >= n || (status && status[run].done))
    return;
  bias += run * k;
  t.choose_rows(first_row);
  constexpr int none = std::numeric_limits<int>::max();
  label += run * x.capacity;
#pragma unroll 1
  for (int first = 0; first < k; first += Tiles::kColumns) {
    t.choose_columns(first);
    __syncthreads();
    T sum[M][N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const int c = first + t.column(u);
      const T own = c < k ? bias[c] : -kInf<T>;
#pragma unroll
      for (int m = 0; m < M; ++m)
        sum[m][u] = own;
    }
    t.multiply(sum);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      T best = -kInf<T>;
      int found = none;
      const auto take_better = [&](T other, int where) { // not NaN
        if (other > best || (other == best && where < found)) {
          best = other;
          found = where;
        }
      };
#pragma unroll
      for (int u = 0; u < N; ++u)
        if (sum[m][u] > -kInf<T>)
          take_better(sum[m][u], first + t.column(u));
#pragma unroll
      for (int step = kTileSide / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(kAllLanes, best, step);
        take_better(other, __shfl_xor_sync(kAllLanes, found, step));
      }
      if (t.x == 0) { // the same thread for every first
        const int r = t.row(m);
        if (first == 0 || best > t.shared.best[r]) {
          t.shared.best[r] = best;
          t.shared.found[r] = found;
        }
        if (first + Tiles::kColumns >= k && first_row + r < n)
          label[first_row + r] = t.shared.found[r] == none ? -1 : t.shared.found[r];
      }
    }
  }
}

// Squared distance of point i to a centroid times `unit`, in all lanes of a warp: from differences.
template <typename S>
__device__ inline acc_t<S> squared_distance(
    const Points<S>& x, int i, const acc_t<S>* centroid, acc_t<S> unit = 1) {
  using T = acc_t<S>;
  const int row = x.row(i);
  const S* const from = x.data(row);
  const T scale = x.factor(row);
  T sum = 0;
#pragma unroll 4
  for (int j = lane_id(); j < x.d; j += kWarp) {
    const T difference = x.value(from[j], scale, x.center_at(j)) - centroid[j] * unit;
    sum += difference * difference;
  }
  return warp_sum(sum);
}

} // namespace oodk::cuda
