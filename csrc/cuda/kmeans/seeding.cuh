// Greedy k-means++ on CUDA, see kmeans/driver.cuh.
#pragma once

#include "cuda/kmeans/points.cuh"

namespace oodk::cuda {

// The first i with values[i] > 0 whose share of the running total, which starts at `before`,
// reaches past `target`; else the last with values[i] > 0, -1 if there is none. `before` becomes
// the total before it. For a whole warp.
template <typename V>
__device__ inline int find_share(const V* values, int n, double target, double& before) {
  int found = -1;
  double total = before;
  for (int first = 0; first < n; first += kWarp) {
    const int i = first + lane_id();
    const double value = i < n ? double(values[i]) : 0;
    const double sum = warp_inclusive_scan(value);
    const unsigned some = __ballot_sync(kAllLanes, value > 0);
    const unsigned past = __ballot_sync(kAllLanes, value > 0 && total + sum > target);
    if (some) {
      const int source = past ? __ffs(int(past)) - 1 : kWarp - 1 - __clz(int(some));
      found = first + source;
      before = total + __shfl_sync(kAllLanes, sum - value, source);
    }
    if (past)
      break;
    total += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  return found;
}

constexpr int kShare = 2 * kWarp; // points whose squared distances are summed to one number

template <typename S>
struct Seeding {
  using T = acc_t<S>;

  Points<S> x;
  const T* norm2; // (problems, x.capacity)
  const T* dots; // products of points: (problems, x.capacity, pitch) of all, if `gram`, else
  bool gram; // (runs, trials, pitch) of the candidates
  int64_t pitch;
  int k, restarts, trials;
  uint64_t seed;
  int restart = 0; // of a run
  T* d2 = nullptr; // (runs, x.capacity), to the nearest centre so far
  double* shares = nullptr; // (runs, most_shares()): sums of kShare of them
  double* potential = nullptr; // (runs, trials, slices())
  unsigned char* chosen = nullptr; // (runs, x.capacity)
  int *candidate = nullptr, *candidate_row = nullptr; // (runs, trials): points; rows of x
  int64_t* rows = nullptr; // (runs, k): rows of x

  __host__ __device__ int most_shares() const {
    return (x.capacity + kShare - 1) / kShare;
  }
  static __host__ __device__ int slices(int threads, int trials) { // of a candidate's potential
    return trials < threads / kWarp ? threads / kWarp / trials : 1;
  }

  __device__ Seeding at(int64_t run) const {
    Seeding s = *this;
    const int64_t b = run / restarts;
    s.restart = int(run % restarts);
    s.x = x.at(b);
    s.norm2 += b * x.capacity;
    s.dots += gram ? b * x.capacity * pitch : run * trials * pitch;
    s.d2 += run * x.capacity;
    s.shares += run * most_shares();
    s.potential += run * trials * slices(int(blockDim.x), trials);
    s.chosen += run * x.capacity;
    s.candidate += run * trials;
    s.candidate_row += run * trials;
    s.rows += run * k;
    return s;
  }

  __device__ T distance(const T* dot, T norm2_c, int i) const {
    return larger(T(0), norm2[i] + norm2_c - 2 * dot[i]);
  }
  __device__ const T* dots_of(int l) const {
    return dots + (gram ? candidate[l] : l) * pitch;
  }

  __device__ void begin() const {
    for (int i = int(threadIdx.x); i < x.size(); i += int(blockDim.x)) {
      d2[i] = std::numeric_limits<T>::max();
      chosen[i] = 0;
    }
    for (int l = int(threadIdx.x); l < trials; l += int(blockDim.x))
      candidate_row[l] = -1; // for good, where there is no point
  }

  // Candidates of step t, all the same where no choice is left. A warp a candidate.
  __device__ void draw(int t) const {
    const int n = x.size(), warps = int(blockDim.x) / kWarp;
    for (int l = warp_id(); l < trials; l += warps) {
      const int index = t ? l : 0;
      const double u = uniform(
          random_bits(seed, Stream::seeding, uint32_t(restart), uint32_t(t), uint32_t(index)));
      double total = 0;
      const int many = (n + kShare - 1) / kShare;
      if (t > 0) {
        for (int i = lane_id(); i < many; i += kWarp)
          total += shares[i];
        total = warp_sum(total);
      }
      int point = int(u * double(n));
      if (total > 0) {
        double before = 0;
        const int at = find_share(shares, many, u * total, before) * kShare;
        point = at + find_share(d2 + at, min(kShare, n - at), u * total, before);
      } else if (t > 0) { // every point lies on a centre: the first not chosen
        unsigned free = 0;
        for (int first = 0; !free; first += kWarp) {
          const int i = first + lane_id();
          free = __ballot_sync(kAllLanes, i < n && !chosen[i]);
          point = first + __ffs(int(free)) - 1;
        }
      }
      if (lane_id() == 0) {
        candidate[l] = point;
        candidate_row[l] = x.row(point);
      }
    }
  }

  // Takes the best candidate of step t, of which all products are known.
  __device__ void choose(int t) const {
    const int n = x.size(), warps = int(blockDim.x) / kWarp;
    const int parts = slices(int(blockDim.x), trials), each = (n + parts - 1) / parts;
    for (int item = warp_id(); item < trials * parts; item += warps) {
      const int l = item / parts, first = item % parts * each, c = candidate[l];
      const T* const dot = dots_of(l);
      const T norm2_c = norm2[c];
      double sum = 0;
#pragma unroll 4
      for (int i = first + lane_id(); i < min(first + each, n); i += kWarp)
        sum += double(min(d2[i], distance(dot, norm2_c, i)));
      sum = warp_sum(sum);
      if (lane_id() == 0)
        potential[item] = sum;
    }
    __syncthreads();
    __shared__ int winner;
    if (threadIdx.x == 0) {
      double least = kInf<double>;
      winner = 0;
      for (int l = 0; l < trials; ++l) {
        double sum = 0;
        for (int p = 0; p < parts; ++p)
          sum += potential[l * parts + p];
        if (sum < least) {
          least = sum;
          winner = l;
        }
      }
      chosen[candidate[winner]] = 1;
      rows[t] = candidate_row[winner];
    }
    __syncthreads();
    const T* const dot = dots_of(winner);
    const T norm2_c = norm2[candidate[winner]];
    for (int share = warp_id(); share * kShare < n; share += warps) {
      double sum = 0;
#pragma unroll
      for (int half = 0; half < kShare; half += kWarp) {
        const int i = share * kShare + half + lane_id();
        if (i < n) {
          const T now = min(d2[i], distance(dot, norm2_c, i));
          d2[i] = now;
          sum += double(now);
        }
      }
      sum = warp_sum(sum);
      if (lane_id() == 0)
        shares[share] = sum;
    }
  }
};

// A block a run. Step t of [begin, end): choose among the candidates of t - 1, then draw those of
// t.
template <typename S>
__global__ void __launch_bounds__(kBlockThreads, 1) seed_runs(Seeding<S> all, int begin, int end) {
  const Seeding<S> run = all.at(blockIdx.x);
  const int steps = min(run.k, run.x.size());
  for (int t = begin; t < end; ++t) {
    if (t == 0)
      run.begin();
    else if (t <= steps)
      run.choose(t - 1);
    __syncthreads();
    if (t < steps)
      run.draw(t);
    else if (t < run.k && threadIdx.x == 0)
      run.rows[t] = -1;
    __syncthreads();
  }
}

} // namespace oodk::cuda
