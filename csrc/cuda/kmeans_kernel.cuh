// K-means on CUDA: the contract is that of ops/kmeans.h, the steps are those of cpu/kmeans_core.cpp.
// A run is one restart of one problem. Everything is decided on the device: the host enqueues the
// same launches whatever the data.
//
// Seeding, a block a run: each step draws candidates, and takes the one that leaves the least sum of
// squared distances |x|^2 + |c|^2 - 2 x . c. Products come from G = X X^T, computed once for all runs,
// where N is not large: all steps are one launch that reads `trials` rows of G a step. Elsewhere a
// launch of tiles multiplies all runs' candidates with the points before each step.
//
// Lloyd, up to kSmall points: all iterations in one launch, a block a run. A centroid is the mean of
// its members, so its products with the points are the mean of rows of G: from one iteration to the
// next only clusters that changed are summed again, N (d + N) values at most, out of L2, and labels
// take N K multiply-adds. More points: an iteration is four launches over all runs (assign, sort, sum,
// move), N d K multiply-adds in tiles that keep the argmin in registers (points.cuh) and one more read
// of x. A run that is done lets what is still enqueued for it pass.
//
// In both, members are sorted by cluster (a stable counting sort), and summed in pieces of 32 in that
// order: float within a piece, float64 across. Nothing depends on the order of threads or blocks, nor on
// the rest of the batch. The labels returned are those of nearest_centroid for the centroids returned.
#pragma once

#include <algorithm>

#include "cuda/launches.cuh"
#include "cuda/points.cuh"

namespace oodk::cuda {

constexpr int kSmall = 1024; // most points of a problem whose iterations are all one launch
constexpr int kGram = 8192; // most points whose products are all computed, for seeding alone
constexpr int kSeedingLimit = 1 << 16, kSeedingSample = 1 << 15; // as on the CPU

// --- seeding --------------------------------------------------------------------------------------

// The first i with values[i] > 0 whose share of the running total, which starts at `before`, reaches
// past `target`; else the last with values[i] > 0, -1 if there is none. `before` becomes the total
// before it. For a whole warp.
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
  const T* dots; // products: (problems, x.capacity, pitch) of points, or (problems, restarts, trials,
                 // pitch) of the candidates
  bool gram; // the former
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
      const double u = uniform(random_bits(
          seed, Stream::seeding, uint32_t(restart), uint32_t(t), uint32_t(index)));
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

// A block a run. Step t of [begin, end): choose among the candidates of t - 1, then draw those of t.
template <typename S>
__global__ void __launch_bounds__(kBlockThreads, 1)
    seed_runs(Seeding<S> all, int begin, int end) {
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

// --- Lloyd's iteration ----------------------------------------------------------------------------

constexpr int kPiece = kWarp; // members that are summed in float
constexpr int kSumColumns = 4 * kWarp;

// Members sorted by cluster: those of c are order[start[c]] .. order[start[c + 1] - 1], in pieces
// pieces[c] .. pieces[c + 1] - 1 of kPiece each.
struct Members {
  int k;
  int *order, *start, *pieces;
  int* dirty; // the cluster's members have changed
};

// partial (., pitch): of each piece of a cluster that is dirty, the sum of its members' rows. A warp
// sums kSumColumns columns of a piece.
template <typename S>
__device__ inline void sum_pieces(const Points<S>& x, int width, const Members& members,
    acc_t<S>* partial, int64_t pitch, Warps warps) {
  using T = acc_t<S>;
  constexpr int V = kSumColumns / kWarp; // columns of a lane
  const int groups = (width + kSumColumns - 1) / kSumColumns;
  const int64_t items = int64_t(members.pieces[members.k]) * groups;
  for (int64_t item = warps.index; item < items; item += warps.count) {
    const int piece = int(item / groups), column = int(item % groups) * kSumColumns + lane_id();
    int c = 0;
    for (int above = members.k; above - c > 1;) { // pieces[c] <= piece < pieces[c + 1], at the end
      const int middle = c + (above - c) / 2;
      (members.pieces[middle] <= piece ? c : above) = middle;
    }
    if (!members.dirty[c])
      continue;
    const int begin = members.start[c] + (piece - members.pieces[c]) * kPiece;
    const int count = min(kPiece, members.start[c + 1] - begin);
    const int own_row = lane_id() < count ? x.row(members.order[begin + lane_id()]) : 0;
    const T own_scale = lane_id() < count ? x.factor(own_row) : T(0);
    T sum[V] = {};
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const S* const row = x.data(__shfl_sync(kAllLanes, own_row, i)) + column;
      const T scale = __shfl_sync(kAllLanes, own_scale, i);
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (column + v * kWarp < width)
          sum[v] += widen(row[v * kWarp]) * scale;
    }
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (column + v * kWarp < width)
        partial[piece * pitch + column + v * kWarp] = sum[v];
  }
}

// Sum over the members of cluster c: of column j of its pieces, of which there is one at least.
template <typename T>
__device__ inline T total_of(const T* partial, int64_t pitch, const Members& members, int c, int j) {
  const int first = members.pieces[c], last = members.pieces[c + 1];
  if (last - first == 1)
    return partial[first * pitch + j];
  double sum = 0;
#pragma unroll 4
  for (int p = first; p < last; ++p)
    sum += double(partial[p * pitch + j]);
  return T(sum);
}

// All runs' state, or with at() one's.
template <typename S>
struct Lloyd {
  using T = acc_t<S>;

  Points<S> x; // with ids and count
  int k, restarts, max_iter, threads;
  double tol;
  bool renormalize;
  const double* deviations = nullptr; // (problems, groups of 32 features)
  const int64_t* rows = nullptr; // (runs, k) where it starts, or null:
  const T* start_centroids = nullptr; // (runs, k, d)
  T *centroids = nullptr, *bias = nullptr; // (runs, k, d), (runs, k)
  T* partial = nullptr; // (runs, most_pieces(), d)
  int *label = nullptr, *before = nullptr; // (runs, n), of this iteration and the last
  int *member = nullptr, *member_before = nullptr; // the same, after empty clusters took theirs
  Members members{}; // (runs, max(n, k)), (runs, k + 1) twice, (runs, k)
  int *histogram = nullptr, *left = nullptr; // see block.cuh; (runs, k): members that are left
  T* distance = nullptr; // (runs, n)
  double *shift = nullptr, *inertia = nullptr; // (runs, k), (runs,)
  RunStatus* status = nullptr; // (runs,)

  // With all products of points, else null:
  const T* gram = nullptr; // (problems, n, pitch)
  int64_t pitch = 0;
  T *dots = nullptr, *factor = nullptr; // (runs, k, pitch): products with the centroids, but for (runs, k) factors
  T* gram_partial = nullptr; // (runs, most_pieces(), pitch)

  __host__ __device__ int most_members() const {
    return x.capacity > k ? x.capacity : k;
  }
  __host__ __device__ int most_pieces() const {
    return (most_members() + kPiece - 1) / kPiece + k;
  }

  __device__ Lloyd at(int64_t run) const {
    Lloyd f = *this;
    const int64_t n = x.capacity, b = run / restarts;
    f.x = x.at(b);
    f.deviations = deviations ? deviations + b * ((x.d + kWarp - 1) / kWarp) : nullptr;
    f.rows = rows ? rows + run * k : nullptr;
    f.start_centroids = start_centroids ? start_centroids + run * k * x.d : nullptr;
    f.centroids += run * k * x.d;
    f.bias += run * k;
    f.partial += run * most_pieces() * x.d;
    f.label += run * n;
    f.before += run * n;
    f.member += run * n;
    f.member_before += run * n;
    f.members.order += run * most_members();
    f.members.start += run * (k + 1);
    f.members.pieces += run * (k + 1);
    f.members.dirty += run * k;
    f.histogram += run * Histogram::size(threads, k);
    f.left += run * k;
    f.distance += run * n;
    f.shift += run * k;
    f.inertia += run;
    f.status += run;
    if (gram) {
      f.gram += b * n * pitch;
      f.dots += run * k * pitch;
      f.factor += run * k;
      f.gram_partial += run * most_pieces() * pitch;
    }
    return f;
  }

  __device__ Points<T> gram_rows() const {
    const int n = x.size();
    return {gram, n, pitch, n, n};
  }
  __device__ const T* centroid(int c) const {
    return centroids + int64_t(c) * x.d;
  }

  // The point that a row of x is, -1 for one that is left out or that x does not have.
  __device__ int point(int64_t row) const {
    int below = -1, above = x.size(); // the last with ids[.] <= row
    while (above - below > 1) {
      const int middle = below + (above - below) / 2;
      (x.ids[middle] <= row ? below : above) = middle;
    }
    return below >= 0 && x.ids[below] == row ? below : -1;
  }

  // Where the run starts. With rows, each is the only member of its cluster.
  __device__ void begin() const {
    if (threadIdx.x == 0)
      *status = {0, 0};
    int count = 0;
    for (int first = 0; first < k; first += int(blockDim.x)) {
      const int c = first + int(threadIdx.x);
      const int at = rows && c < k ? point(rows[c]) : -1;
      int total;
      const int place = count + block_exclusive_scan(at >= 0, total);
      count += total;
      if (c < k) {
        members.start[c] = members.pieces[c] = place;
        members.dirty[c] = 1;
        if (at >= 0)
          members.order[place] = at;
        if (!rows && gram)
          factor[c] = 1;
      }
    }
    if (threadIdx.x == 0)
      members.start[k] = members.pieces[k] = count;
    if (!rows)
      for (int c = warp_id(); c < k; c += int(blockDim.x) / kWarp) {
        T norm2 = 0;
        for (int j = lane_id(); j < x.d; j += kWarp) {
          const T value = start_centroids[int64_t(c) * x.d + j];
          centroids[int64_t(c) * x.d + j] = value;
          norm2 += value * value;
        }
        norm2 = warp_sum(norm2);
        if (lane_id() == 0)
          bias[c] = bias_of(norm2);
      }
    __syncthreads();
  }

  __device__ void sum(Warps warps) const {
    sum_pieces(x, x.d, members, partial, x.d, warps);
    if (gram)
      sum_pieces(gram_rows(), x.size(), members, gram_partial, pitch, warps);
  }

  // Centroids of the clusters whose members have changed, a warp each.
  __device__ void move(bool first, Warps warps) const {
    for (int c = warps.index; c < k; c += warps.count) {
      if (!members.dirty[c]) {
        if (lane_id() == 0)
          shift[c] = 0;
        continue;
      }
      const int count = members.start[c + 1] - members.start[c];
      T* const to = centroids + int64_t(c) * x.d;
      const bool unused = count == 0 && !first && to[0] != to[0]; // before and now
      T divisor = count ? T(count) : kNaN<T>;
      if (renormalize && count) {
        T norm2 = 0;
        for (int j = lane_id(); j < x.d; j += kWarp) {
          const T total = total_of(partial, x.d, members, c, j);
          norm2 += total * total;
        }
        norm2 = warp_sum(norm2);
        divisor = norm2 > 0 ? root(norm2) : T(1);
      }
      __syncwarp(); // to[0] has been read
      double moved = 0;
      T norm2 = 0;
      for (int j = lane_id(); j < x.d; j += kWarp) {
        const T value = (count ? total_of(partial, x.d, members, c, j) : T(0)) / divisor;
        if (!first)
          moved += double(value - to[j]) * double(value - to[j]);
        to[j] = value;
        norm2 += value * value;
      }
      moved = warp_sum(moved);
      norm2 = warp_sum(norm2);
      if (lane_id() == 0) {
        shift[c] = unused ? 0 : moved;
        bias[c] = bias_of(norm2);
      }
      if (gram) {
        if (lane_id() == 0)
          factor[c] = count ? 1 / divisor : T(0);
        for (int i = lane_id(); i < x.size() && count; i += kWarp)
          dots[c * pitch + i] = total_of(gram_partial, pitch, members, c, i);
      }
    }
  }

  // Labels from products at hand, a thread a point.
  __device__ void assign_products() const {
    for (int i = int(threadIdx.x); i < x.size(); i += int(blockDim.x)) {
      T best = -kInf<T>;
      int found = -1;
#pragma unroll 8
      for (int c = 0; c < k; ++c) {
        const T score = dots[c * pitch + i] * factor[c] + bias[c];
        if (score > best) {
          best = score;
          found = c;
        }
      }
      label[i] = found;
    }
  }

  __device__ void find_distances(Warps warps) const {
    for (int i = warps.index; i < x.size(); i += warps.count) {
      const T found = label[i] < 0 ? T(0) : squared_distance(x, i, centroid(label[i]));
      if (lane_id() == 0)
        distance[i] = found;
    }
  }

  __device__ void sum_distances() const {
    double own = 0;
    for (int i = int(threadIdx.x); i < x.size(); i += int(blockDim.x))
      own += double(distance[i]);
    own = block_sum(own);
    if (threadIdx.x == 0)
      *inertia = own;
  }

  // After the labels of iteration i: whether the run has ended. If not, the members of its clusters
  // are sorted. For a block.
  __device__ bool sort(int i) const {
    const int n = x.size();
    double moved = 0, limit = 0;
    if (n == 0)
      return end(0);
    if (i > 0) {
      for (int c = lane_id(); c < k; c += kWarp)
        moved += shift[c];
      moved = warp_sum(moved);
      if (tol > 0) {
        for (int g = lane_id(); g < (x.d + kWarp - 1) / kWarp; g += kWarp)
          limit += deviations[g];
        limit = tol * warp_sum(limit) / (double(n) * x.d);
      }
      if (moved <= limit)
        return end(i);
    }
    for (int c = int(threadIdx.x); c < k; c += int(blockDim.x))
      members.dirty[c] = i == 0;
    const Histogram table{histogram, k};
    bool changed = i == 0;
    count_members(n, table, [&](int p) {
      const int c = label[p];
      changed |= i > 0 && c != before[p];
      before[p] = member[p] = c;
      return c;
    });
    if (!__syncthreads_or(changed))
      return end(i + 1);
    if (place_clusters()) {
      refill();
      count_members(n, table, [&](int p) { return member[p]; });
      place_clusters();
    }
    const auto moved_member = [&](int p) {
      const int c = member[p], last = i > 0 ? member_before[p] : c;
      if (c != last) {
        if (c >= 0)
          members.dirty[c] = 1;
        if (last >= 0)
          members.dirty[last] = 1;
      }
      member_before[p] = c;
      return c;
    };
    place_members(n, table, moved_member, members.order);
    return false;
  }

 private:
  __device__ bool end(int iterations) const {
    if (threadIdx.x == 0)
      *status = {iterations, 1};
    return true;
  }

  // After count_members(): where members and pieces go; whether a cluster is empty.
  __device__ bool place_clusters() const {
    cuda::place_clusters(Histogram{histogram, k}, members.start);
    bool empty = false;
    int count = 0;
    for (int first = 0; first < k; first += int(blockDim.x)) {
      const int c = first + int(threadIdx.x);
      const int size = c < k ? members.start[c + 1] - members.start[c] : 0;
      empty |= c < k && size == 0;
      int total;
      const int place = count + block_exclusive_scan((size + kPiece - 1) / kPiece, total);
      count += total;
      if (c < k)
        members.pieces[c] = place;
    }
    if (threadIdx.x == 0)
      members.pieces[k] = count;
    return __syncthreads_or(empty);
  }

  // Empty clusters take the points that lie farthest from their centroids, from clusters that keep
  // one.
  __device__ void refill() const {
    __shared__ acc_t<S> farthest[kWarp];
    __shared__ int where[kWarp];
    for (int c = int(threadIdx.x); c < k; c += int(blockDim.x))
      left[c] = members.start[c + 1] - members.start[c];
    find_distances(Warps::of_block());
    __syncthreads();
    for (int c = 0; c < k; ++c) {
      if (members.start[c] < members.start[c + 1])
        continue;
      T most = -1;
      int at = std::numeric_limits<int>::max();
      const auto take_farther = [&](T other, int other_at) {
        if (other > most || (other == most && other_at < at)) {
          most = other;
          at = other_at;
        }
      };
      for (int i = int(threadIdx.x); i < x.size(); i += int(blockDim.x))
        if (label[i] < 0 || left[label[i]] > 1)
          take_farther(distance[i], i); // -1 once taken
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(kAllLanes, most, step);
        take_farther(other, __shfl_xor_sync(kAllLanes, at, step));
      }
      if (lane_id() == 0) {
        farthest[warp_id()] = most;
        where[warp_id()] = at;
      }
      __syncthreads();
      for (int w = 0; w < int(blockDim.x) / kWarp; ++w)
        take_farther(farthest[w], where[w]);
      if (!(most >= 0))
        break; // none is left
      __syncthreads();
      if (threadIdx.x == 0) {
        member[at] = c;
        distance[at] = -1;
        if (label[at] >= 0)
          --left[label[at]];
      }
      __syncthreads();
    }
    __syncthreads();
  }
};

constexpr int kFitThreads = 384; // more leave too few registers for the sums' loads to overlap

// All of a run, from products of points. A block a run.
template <typename S>
__global__ void __launch_bounds__(kFitThreads, 1) fit_runs(Lloyd<S> all) {
  const Lloyd<S> run = all.at(blockIdx.x);
  const Warps warps = Warps::of_block();
  const auto update = [&](bool first) {
    run.sum(warps);
    __syncthreads();
    run.move(first, warps);
    __syncthreads();
  };
  run.begin();
  if (run.rows)
    update(true);
  bool done = false;
  for (int i = 0;; ++i) {
    run.assign_products();
    __syncthreads();
    if (i == run.max_iter || (done = run.sort(i)))
      break;
    update(false);
  }
  if (!done && threadIdx.x == 0)
    *run.status = {run.x.size() ? run.max_iter : 0, 1};
  run.find_distances(warps);
  __syncthreads();
  run.sum_distances();
}

// The same in single steps, for many points.
template <typename S>
__global__ void __launch_bounds__(kBlockThreads) begin_runs(Lloyd<S> all) {
  all.at(blockIdx.x).begin();
}

template <typename S>
__global__ void __launch_bounds__(kBlockThreads) sort_runs(Lloyd<S> all, int i) {
  const Lloyd<S> run = all.at(blockIdx.x);
  if (run.status->done)
    return;
  __syncthreads(); // all threads have read it
  run.sort(i);
}

template <typename S>
__global__ void __launch_bounds__(kPointThreads, 2) sum_runs(Lloyd<S> all, int blocks) {
  const Lloyd<S> run = all.at(blockIdx.x / blocks);
  if (!run.status->done)
    run.sum(Warps::of_blocks(int(blockIdx.x) % blocks, blocks));
}

template <typename S>
__global__ void __launch_bounds__(kPointThreads) move_runs(Lloyd<S> all, bool first, int blocks) {
  const Lloyd<S> run = all.at(blockIdx.x / blocks);
  if (!run.status->done)
    run.move(first, Warps::of_blocks(int(blockIdx.x) % blocks, blocks));
}

template <typename S>
__global__ void __launch_bounds__(kPointThreads) find_run_distances(Lloyd<S> all, int blocks) {
  all.at(blockIdx.x / blocks).find_distances(Warps::of_blocks(int(blockIdx.x) % blocks, blocks));
}

template <typename S>
__global__ void __launch_bounds__(kBlockThreads) end_runs(Lloyd<S> all) {
  const Lloyd<S> run = all.at(blockIdx.x);
  run.sum_distances();
  if (threadIdx.x == 0 && !run.status->done)
    *run.status = {run.x.size() ? run.max_iter : 0, 1};
}

// --- results --------------------------------------------------------------------------------------

// Of each problem the run of least inertia, the first of equals. `blocks` blocks a problem.
template <typename S>
__global__ void __launch_bounds__(kPointThreads) take_best(
    Lloyd<S> all, acc_t<S>* centroids, acc_t<S>* bias, int64_t* n_iter, int blocks) {
  const int64_t b = blockIdx.x / blocks;
  const int part = int(blockIdx.x) % blocks;
  int64_t best = b * all.restarts;
  for (int64_t run = best + 1; run < (b + 1) * all.restarts; ++run)
    if (all.inertia[run] < all.inertia[best])
      best = run;
  const int64_t size = int64_t(all.k) * all.x.d;
  const int64_t first = int64_t(part) * blockDim.x + threadIdx.x, step = int64_t(blocks) * blockDim.x;
  for (int64_t e = first; e < size; e += step)
    centroids[b * size + e] = all.centroids[best * size + e];
  for (int64_t c = first; c < all.k; c += step)
    bias[b * all.k + c] = all.bias[best * all.k + c];
  if (first == 0)
    n_iter[b] = all.status[best].iterations;
}

// A warp a point: label and squared distance by row, (problems, x.rows); found and those of x are by
// point. -1 and NaN where there is none.
template <typename S>
__global__ void __launch_bounds__(kPointThreads) write_nearest(Points<S> x, int64_t problems,
    const acc_t<S>* centroids, int k, const int* found, int64_t* label, acc_t<S>* distance) {
  const int64_t item = int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp_id();
  if (item >= problems * x.capacity)
    return;
  const int64_t b = item / x.capacity;
  const int i = int(item % x.capacity);
  const Points<S> points = x.at(b);
  if (i >= points.size())
    return;
  const int row = points.row(i);
  const acc_t<S> scale = points.factor(row);
  const int c = scale == scale ? found[item] : -1;
  const acc_t<S> squared =
      c < 0 ? kNaN<acc_t<S>> : squared_distance(points, i, centroids + (b * k + c) * x.d);
  if (lane_id() == 0) {
    label[b * x.rows + row] = c;
    distance[b * x.rows + row] = squared;
  }
}

// A block a problem: the sum of the distances of its points, by row; 0 for NaN.
template <typename S>
__global__ void __launch_bounds__(kBlockThreads)
    sum_nearest(Points<S> x, const acc_t<S>* distance, double* inertia) {
  const Points<S> points = x.at(blockIdx.x);
  double own = 0;
  for (int i = int(threadIdx.x); i < points.size(); i += int(blockDim.x)) {
    const double value = double(distance[blockIdx.x * x.rows + points.row(i)]);
    own += value == value ? value : 0;
  }
  own = block_sum(own);
  if (threadIdx.x == 0)
    inertia[blockIdx.x] = own;
}

// --- host -----------------------------------------------------------------------------------------

// Where and how the kernels run: sizes at which the way changes, for tests to set.
struct KmeansLaunches : Launches {
  int small = kSmall, gram = kGram, seeding_limit = kSeedingLimit, sample = kSeedingSample;
  int64_t memory = int64_t(1) << 30; // bytes that a part of a batch may take
};

// Calls f(M, N) with the largest tiles of `rows` and `columns` that leave the device enough of them:
// of 16 M rows there are tiles(M).
template <typename T, typename Tiles, typename F>
void with_tile(const KmeansLaunches& on, int rows, int64_t columns, const Tiles& tiles, const F& f) {
  constexpr std::integral_constant<int, 4> low;
  constexpr std::integral_constant<int, 8> high;
  constexpr std::integral_constant<int, kPerUnit<T>> narrow;
  constexpr std::integral_constant<int, 2 * kPerUnit<T>> wide;
  const bool few = rows <= kTileSide * low || tiles(low) < 4 * int64_t(on.device.processors);
  if (columns <= kTileSide * narrow)
    few ? f(low, narrow) : f(high, narrow);
  else
    few ? f(low, wide) : f(high, wide);
}

template <typename A, typename B>
void launch_multiply(const KmeansLaunches& on, const Points<A>& a, const Points<B>& b,
    int64_t problems, int64_t pitch, acc_t<A>* out) {
  constexpr int n = 2 * kPerUnit<acc_t<A>>;
  const auto tiles = [&](int m) {
    return problems * whole_blocks(a.capacity, kTileSide * m) * whole_blocks(pitch, kTileSide * n);
  };
  with_tile<acc_t<A>>(on, a.capacity, kTileSide * n, tiles, [&](auto m, auto) {
    constexpr int M = decltype(m)::value;
    on.run(multiply<A, B, M, n>, tiles(M), kTileThreads, sizeof(typename Tile<A, B, M, n>::Shared),
        a, b, pitch, out);
  });
}

template <typename S>
void launch_assign(const KmeansLaunches& on, const Points<S>& x, const Points<acc_t<S>>& centroids,
    const acc_t<S>* bias, int64_t runs, int restarts, const RunStatus* status, int* label) {
  const auto tiles = [&](int m) { return runs * whole_blocks(x.capacity, kTileSide * m); };
  with_tile<acc_t<S>>(on, x.capacity, centroids.capacity, tiles, [&](auto m, auto n) {
    using Tiles = Tile<S, acc_t<S>, decltype(m)::value, decltype(n)::value>;
    on.run(assign<S, decltype(m)::value, decltype(n)::value>, tiles(m), kTileThreads,
        sizeof(typename Tiles::Shared), x, centroids, bias, restarts, status, label);
  });
}

// Some problems, prepared for clustering.
template <typename S>
class Clustering {
  using T = acc_t<S>;

 public:
  // Rows left out get the label -1, where `labels` is given.
  Clustering(const KmeansLaunches& on, const KmeansInput& in, int64_t* labels)
      : on_(on), batch_(in.batch) {
    T* const scale = on.scratch.array<T>(batch_ * in.n);
    int* const ids = on.scratch.array<int>(batch_ * in.n);
    int* const count = on.scratch.array<int>(batch_);
    const int n = int(in.n);
    x_ = {(const S*)in.x, in.n, in.stride, int(in.d), n, scale, ids, count};
    on.run(scale_rows<S>, on.blocks(1, batch_ * n), kPointThreads, 0, x_, batch_ * n, in.normalize,
        scale);
    on.run(list_valid_rows<T>, batch_, on.threads, 0, scale, n, ids, count, labels);
    pitch_ = whole_blocks(n, kPerUnit<T>) * kPerUnit<T>;
  }

  static int64_t bytes(const KmeansLaunches& on, const KmeansInput& in, const KmeansOptions& o) {
    const int64_t n = in.n, runs = o.restarts, pieces = std::max<int64_t>(n, o.k) / kPiece + 1 + o.k;
    int64_t values = runs * (pieces * in.d + 4 * n + o.k * in.d);
    if (n <= on.small)
      values += runs * (pieces + o.k) * n;
    if (uses_gram(on, n, o))
      values += n * n;
    else
      values += runs * o.trials * n;
    return values * int64_t(sizeof(T)) + runs * (24 * n + 8 * Histogram::size(on.threads, o.k));
  }

  // rows (batch, restarts, k)
  void seed(const KmeansOptions& o, int64_t* rows) {
    const int64_t runs = batch_ * o.restarts;
    Points<S> x = x_;
    int64_t pitch = pitch_;
    const bool gram = uses_gram(on_, x.capacity, o);
    if (x.capacity > on_.seeding_limit) {
      x.capacity = int(std::max({int64_t(on_.seeding_limit), int64_t(on_.sample),
          std::min<int64_t>(x.rows, 2 * int64_t(o.k))}));
      int* const ids = on_.scratch.array<int>(batch_ * x.capacity);
      int* const count = on_.scratch.array<int>(batch_);
      on_.run(sample_points<S>, batch_, on_.threads, 0, x_, on_.seeding_limit, on_.sample, o.k, o.seed,
          x.capacity, ids, count);
      x.ids = ids;
      x.count = count;
      pitch = whole_blocks(x.capacity, kPerUnit<T>) * kPerUnit<T>;
    }
    Scratch& scratch = on_.scratch;
    T* const norm2 = scratch.array<T>(batch_ * x.capacity);
    on_.run(square_norms<S>, whole_blocks(batch_ * x.capacity, kPointThreads), kPointThreads, 0, x,
        batch_, norm2);
    T* const dots = gram ? nullptr : scratch.array<T>(runs * o.trials * pitch);
    Seeding<S> s{x, norm2, gram ? products() : dots, gram, pitch, o.k, o.restarts, o.trials,
        o.seed};
    s.d2 = scratch.array<T>(runs * x.capacity);
    s.shares = scratch.array<double>(runs * s.most_shares());
    s.potential = scratch.array<double>(runs * o.trials * Seeding<S>::slices(on_.threads, o.trials));
    s.chosen = scratch.array<unsigned char>(runs * x.capacity);
    s.candidate = scratch.array<int>(runs * o.trials);
    s.candidate_row = scratch.array<int>(runs * o.trials);
    s.rows = rows;
    if (gram) {
      on_.run(seed_runs<S>, runs, on_.threads, 0, s, 0, o.k + 1);
      return;
    }
    Points<S> candidates = x;
    candidates.capacity = o.restarts * o.trials;
    candidates.ids = s.candidate_row;
    candidates.count = nullptr;
    for (int t = 0; t <= o.k; ++t) {
      on_.run(seed_runs<S>, runs, on_.threads, 0, s, t, t + 1);
      if (t < o.k)
        launch_multiply(on_, candidates, x, batch_, pitch, dots);
    }
  }

  // From rows (batch, restarts, k) or centroids (batch, k, d). Outputs as ops/kmeans.h has them.
  void fit(const KmeansOptions& o, const int64_t* rows, const T* start_centroids, T* centroids,
      int64_t* labels, double* inertia, int64_t* n_iter) {
    Scratch& scratch = on_.scratch;
    const int64_t runs = batch_ * o.restarts, n = x_.capacity;
    const int d = x_.d, k = o.k;
    const bool small = n <= on_.small;
    const int threads = small ? std::min(on_.threads, kFitThreads) : on_.threads;
    Lloyd<S> l{x_, k, o.restarts, o.max_iter, threads, o.tol, o.renormalize};
    if (o.tol > 0) {
      const int64_t groups = whole_blocks(d, kWarp);
      double* const deviations = scratch.array<double>(batch_ * groups);
      on_.run(sum_deviations<S>, batch_ * groups, on_.threads, 0, x_, deviations);
      l.deviations = deviations;
    }
    l.rows = rows;
    l.start_centroids = start_centroids;
    l.centroids = scratch.array<T>(runs * k * d);
    l.bias = scratch.array<T>(runs * k);
    l.partial = scratch.array<T>(runs * l.most_pieces() * d);
    for (int** labels_of : {&l.label, &l.before, &l.member, &l.member_before})
      *labels_of = scratch.array<int>(runs * n);
    l.members = {k, scratch.array<int>(runs * l.most_members()), scratch.array<int>(runs * (k + 1)),
        scratch.array<int>(runs * (k + 1)), scratch.array<int>(runs * k)};
    l.histogram = scratch.array<int>(runs * Histogram::size(threads, k));
    l.left = scratch.array<int>(runs * k);
    l.distance = scratch.array<T>(runs * n);
    l.shift = scratch.array<double>(runs * k);
    l.inertia = scratch.array<double>(runs);
    l.status = scratch.array<RunStatus>(runs);
    if (small) {
      l.gram = products();
      l.pitch = pitch_;
      l.dots = scratch.array<T>(runs * k * pitch_);
      l.factor = scratch.array<T>(runs * k);
      l.gram_partial = scratch.array<T>(runs * l.most_pieces() * pitch_);
      if (start_centroids)
        launch_multiply(on_, Points<T>{start_centroids, k, d, d, k}, x_, batch_, pitch_, l.dots);
      on_.run(fit_runs<S>, runs, threads, 0, l);
    } else {
      iterate(l, runs);
    }

    T* const bias = scratch.array<T>(batch_ * k);
    const int copiers = on_.blocks(batch_, whole_blocks(int64_t(k) * d, 8 * kWarp));
    on_.run(take_best<S>, batch_ * copiers, kPointThreads, 0, l, centroids, bias, n_iter, copiers);
    int* const found = scratch.array<int>(batch_ * n);
    T* const distance = scratch.array<T>(batch_ * n);
    launch_assign<S>(on_, x_, {centroids, k, d, d, k}, bias, batch_, 1, nullptr, found);
    on_.run(write_nearest<S>, whole_blocks(batch_ * n, kPointThreads / kWarp), kPointThreads, 0, x_,
        batch_, centroids, k, found, labels, distance);
    on_.run(sum_nearest<S>, batch_, on_.threads, 0, x_, distance, inertia);
  }

 private:
  static bool uses_gram(const KmeansLaunches& on, int64_t n, const KmeansOptions& o) {
    return n <= on.small || (n <= on.gram && n <= int64_t(o.restarts) * o.trials * o.k);
  }

  void iterate(const Lloyd<S>& l, int64_t runs) const {
    const int summers = on_.blocks(runs, (x_.capacity / kPiece + l.k) * whole_blocks(x_.d, kSumColumns));
    const int movers = on_.blocks(runs, l.k), measurers = on_.blocks(runs, x_.capacity);
    const auto label = [&] {
      launch_assign<S>(on_, x_, {l.centroids, l.k, x_.d, x_.d, l.k}, l.bias, runs, l.restarts,
          l.status, l.label);
    };
    const auto update = [&](bool first) {
      on_.run(sum_runs<S>, runs * summers, kPointThreads, 0, l, summers);
      on_.run(move_runs<S>, runs * movers, kPointThreads, 0, l, first, movers);
    };
    on_.run(begin_runs<S>, runs, on_.threads, 0, l);
    if (l.rows)
      update(true);
    for (int i = 0; i < l.max_iter; ++i) {
      label();
      on_.run(sort_runs<S>, runs, on_.threads, 0, l, i);
      update(false);
    }
    label();
    on_.run(find_run_distances<S>, runs * measurers, kPointThreads, 0, l, measurers);
    on_.run(end_runs<S>, runs, on_.threads, 0, l);
  }

  // G = X X^T (batch, n, pitch_), computed when first asked for.
  const T* products() {
    if (!products_) {
      products_ = on_.scratch.array<T>(batch_ * x_.capacity * pitch_);
      launch_multiply(on_, x_, x_, batch_, pitch_, products_);
    }
    return products_;
  }

  const KmeansLaunches& on_;
  int64_t batch_, pitch_ = 0;
  Points<S> x_{};
  T* products_ = nullptr;
};

// f(part, first) on parts of the batch that fit the memory: clustering is apart for each problem.
template <typename S, typename F>
void for_parts(const KmeansLaunches& on, const KmeansInput& in, const KmeansOptions& o, const F& f) {
  const int64_t most = std::max<int64_t>(1, on.memory / Clustering<S>::bytes(on, in, o));
  for (int64_t first = 0; first < in.batch; first += most) {
    KmeansInput part = in;
    part.x = (const S*)in.x + first * in.n * in.stride;
    part.batch = std::min(most, in.batch - first);
    f(part, first);
    on.scratch.release();
  }
}

// rows: (batch, restarts, k)
inline void kmeans_init(
    const KmeansLaunches& on, const KmeansInput& in, const KmeansOptions& o, int64_t* rows) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    for_parts<S>(on, in, o, [&](const KmeansInput& part, int64_t first) {
      Clustering<S>(on, part, nullptr).seed(o, rows + first * o.restarts * o.k);
    });
  });
}

// From rows (batch, restarts, k), from centroids (batch, k, d), or, if neither is given, as
// kmeans_init() seeds.
inline void kmeans(const KmeansLaunches& on, const KmeansInput& in, const KmeansOptions& o,
    const int64_t* rows, const void* start_centroids, const KmeansResults& out) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    for_parts<S>(on, in, o, [&](const KmeansInput& part, int64_t first) {
      Clustering<S> problems(on, part, out.labels + first * in.n);
      const int64_t* from = rows ? rows + first * o.restarts * o.k : nullptr;
      if (!rows && !start_centroids) {
        int64_t* const seeds = on.scratch.array<int64_t>(part.batch * o.restarts * o.k);
        problems.seed(o, seeds);
        from = seeds;
      }
      problems.fit(o, from,
          start_centroids ? (const T*)start_centroids + first * o.k * in.d : nullptr,
          (T*)out.centroids + first * o.k * in.d, out.labels + first * in.n, out.inertia + first,
          out.n_iter + first);
    });
  });
}

// centroids (batch, k, d) of the type that x is accumulated in, as is distance (batch, n).
inline void nearest_centroid(const KmeansLaunches& on, const KmeansInput& in, const void* centroids, int k,
    int64_t* labels, void* distance) {
  constexpr int64_t most = 1 << 30; // points at a time
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    const int d = int(in.d);
    T* const bias = on.scratch.array<T>(in.batch * k);
    on.run(find_biases<T>, whole_blocks(in.batch * k, kPointThreads / kWarp), kPointThreads, 0,
        (const T*)centroids, in.batch * k, d, bias);
    const int64_t together = in.n <= most ? in.batch : 1; // problems
    const int64_t points = std::min(in.n, most);
    T* const scale = on.scratch.array<T>(together * points);
    int* const found = on.scratch.array<int>(together * points);
    for (int64_t b = 0; b < in.batch; b += together)
      for (int64_t first = 0; first < in.n; first += points) {
        const int64_t n = std::min(points, in.n - first), at = b * in.n + first;
        const Points<S> x{(const S*)in.x + at * in.stride, n, in.stride, d, int(n), scale};
        const T* const c = (const T*)centroids + b * k * d;
        on.run(scale_rows<S>, on.blocks(1, together * n), kPointThreads, 0, x, together * n,
            in.normalize, scale);
        launch_assign<S>(on, x, {c, k, d, d, k}, bias + b * k, together, 1, nullptr, found);
        on.run(write_nearest<S>, whole_blocks(together * n, kPointThreads / kWarp), kPointThreads,
            0, x, together, c, k, found, labels + at, (T*)distance + at);
      }
  });
  on.scratch.release();
}

} // namespace oodk::cuda
