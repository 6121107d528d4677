// Lloyd's iteration on CUDA, see kmeans/driver.cuh.
#pragma once

#include "cuda/kmeans/points.cuh"

namespace oodk::cuda {

constexpr int kPiece = kWarp; // members that are summed in float, which loses 5 bits at most
constexpr int kSumColumns = 4 * kWarp; // of a warp: four loads of a lane are under way at once

// Members sorted by cluster: those of c are order[start[c]] .. order[start[c + 1] - 1], in pieces
// pieces[c] .. pieces[c + 1] - 1 of kPiece each.
struct Members {
  int k;
  int *order, *start, *pieces;
  int* dirty; // the cluster's members have changed
};

// partial (., pitch): of each piece of a cluster that is dirty, the sum of its members' rows. A
// warp sums kSumColumns columns of a piece.
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
    T sum[V] = {}, center[V];
#pragma unroll
    for (int v = 0; v < V; ++v)
      center[v] = x.center_at(column + v * kWarp);
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const S* const row = x.data(__shfl_sync(kAllLanes, own_row, i)) + column;
      const T scale = __shfl_sync(kAllLanes, own_scale, i);
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (column + v * kWarp < width)
          sum[v] += x.value(row[v * kWarp], scale, center[v]);
    }
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (column + v * kWarp < width)
        partial[piece * pitch + column + v * kWarp] = sum[v];
  }
}

// Sum over the members of cluster c: of column j of its pieces, of which there is one at least.
template <typename T>
__device__ inline T total_of(
    const T* partial, int64_t pitch, const Members& members, int c, int j) {
  const int first = members.pieces[c], last = members.pieces[c + 1];
  if (last - first == 1)
    return partial[first * pitch + j];
  double sum = 0;
#pragma unroll 4
  for (int p = first; p < last; ++p)
    sum += double(partial[p * pitch + j]);
  return T(sum);
}

constexpr int kSeen = 64; // iterations after which equal labels are noticed; mostly it is a few

__device__ inline unsigned long long scrambled(unsigned long long x) { // of SplitMix64
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  return x ^ x >> 31;
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
  int* label = nullptr; // (runs, n)
  unsigned long long* seen = nullptr; // (runs, kSeen): hashes of the labels of iterations before
  int *member = nullptr, *member_before = nullptr; // (runs, n): labels, of this iteration and the
  // last, after empty clusters took theirs
  Members members{}; // (runs, max(n, k)), (runs, k + 1) twice, (runs, k)
  int *histogram = nullptr, *left = nullptr; // see block.cuh; (runs, k): members that are left
  T* distance = nullptr; // (runs, n)
  double *shift = nullptr, *inertia = nullptr; // (runs, k), (runs,)
  RunStatus* status = nullptr; // (runs,)

  // With all products of points, else null:
  const T* gram = nullptr; // (problems, n, pitch)
  int64_t pitch = 0;
  T* dots = nullptr; // (runs, k, pitch): with the centroids, but for a factor each
  T* factor = nullptr; // (runs, k)
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
    f.seen += run * kSeen;
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
    // Labels that come again are as good as they get, see cpu/kmeans/solver.cpp.
    unsigned long long hash = 0;
    count_members(n, table, [&](int p) {
      const int c = label[p];
      hash += scrambled((unsigned long long)p << 32 | unsigned(c));
      return member[p] = c;
    });
    hash = block_sum(hash);
    bool again = false;
    for (int s = int(threadIdx.x); s < min(i, kSeen); s += int(blockDim.x))
      again |= seen[s] == hash;
    if (__syncthreads_or(again))
      return end(i + 1);
    if (threadIdx.x == 0)
      seen[i % kSeen] = hash;
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
__global__ void __launch_bounds__(kBlockThreads, 1) sort_runs(Lloyd<S> all, int i) {
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
__global__ void __launch_bounds__(kPointThreads, 2)
    move_runs(Lloyd<S> all, bool first, int blocks) {
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

// --- results -------------------------------------------------------------------------------------

// Of each problem the run of least inertia, the first of equals, back where the points came from.
// `blocks` blocks a problem.
template <typename S>
__global__ void __launch_bounds__(kPointThreads) take_best(Lloyd<S> all, const acc_t<S>* unit,
    const acc_t<S>* center, acc_t<S>* centroids, int64_t* n_iter, int blocks) {
  const int64_t b = blockIdx.x / blocks;
  const int part = int(blockIdx.x) % blocks;
  int64_t best = b * all.restarts;
  for (int64_t run = best + 1; run < (b + 1) * all.restarts; ++run)
    if (all.inertia[run] < all.inertia[best])
      best = run;
  const int64_t size = int64_t(all.k) * all.x.d;
  const int64_t first = int64_t(part) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(blocks) * blockDim.x;
  for (int64_t e = first; e < size; e += step)
    centroids[b * size + e] = unit
        ? (all.centroids[best * size + e] + center[b * all.x.d + e % all.x.d]) / unit[b]
        : all.centroids[best * size + e];
  if (first == 0)
    n_iter[b] = all.status[best].iterations;
}

// A warp a point: label and squared distance by row, (problems, x.rows), where they came from; found
// and those of x are by point. -1 and NaN where there is none.
template <typename S>
__global__ void __launch_bounds__(kPointThreads)
    write_nearest(Points<S> x, int64_t problems, const acc_t<S>* centroids, int k,
        const acc_t<S>* unit, const int* found, int64_t* label, acc_t<S>* distance) {
  const int64_t item = int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp_id();
  if (item >= problems * x.capacity)
    return;
  const int64_t b = item / x.capacity;
  const int i = int(item % x.capacity);
  const Points<S> points = x.at(b);
  if (i >= points.size())
    return;
  const int row = points.row(i);
  const acc_t<S> scale = points.factor(row), own = unit ? unit[b] : acc_t<S>(1);
  const int c = scale == scale ? found[item] : -1;
  const acc_t<S> squared =
      c < 0 ? kNaN<acc_t<S>> : squared_distance(points, i, centroids + (b * k + c) * x.d, own);
  if (lane_id() == 0) {
    label[b * x.rows + row] = c;
    distance[b * x.rows + row] = squared / own / own;
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

} // namespace oodk::cuda
