// K-means on CUDA: the contract is that of ops/kmeans.h, the steps are those of cpu/kmeans/solver.cpp.
// A run is one restart of one problem. Everything is decided on the device: the host enqueues the
// same launches whatever the data.
//
// Seeding, a block a run: each step draws candidates, and takes the one that leaves the least sum
// of squared distances |x|^2 + |c|^2 - 2 x . c. Where N is not large, the products come from
// G = X X^T, computed once for all runs: N^2 d multiply-adds, then a single launch whose steps each
// read `trials` rows of G. Elsewhere a launch of tiles multiplies all runs' candidates with the
// points before each step: N d restarts trials multiply-adds and one read of x.
//
// Lloyd, up to kSmall points: all iterations in one launch, a block a run. A centroid is the mean
// of its members, so its products with the points are the mean of rows of G: from one iteration to
// the next only clusters that changed are summed again, N (d + N) values at most, out of L2, and
// labels take N K multiply-adds. More points: an iteration is four launches over all runs (assign,
// sort, sum, move), N d K multiply-adds in tiles that keep the argmin in registers
// (points.cuh) and one more read of x. A run that is done lets pass what is still enqueued.
//
// N = 384, d = 342, K = 64, 5 restarts: G takes 50 M multiply-adds, a step of seeding reads 9 kB a
// run, an iteration at most 1.1 MB and 25 k multiply-adds a run; 13 launches with the selection.
//
// In both, members are sorted by cluster (a stable counting sort), and summed in pieces of 32 in
// that order: float within a piece, float64 across. Nothing depends on the order of threads or
// blocks, nor on the rest of the batch. The labels returned are those of nearest_centroid for the
// centroids returned.
#pragma once

#include <algorithm>

#include "cuda/kmeans/lloyd.cuh"
#include "cuda/kmeans/points.cuh"
#include "cuda/kmeans/seeding.cuh"
#include "cuda/launches.cuh"

namespace oodk::cuda {

constexpr int kSmall = 1024; // most points of a problem whose iterations are all one launch
constexpr int kGram = 8192; // most points whose products are all computed, for seeding alone

// Where and how the kernels run: sizes at which the way changes, for tests to set.
struct KmeansLaunches : Launches {
  int small = kSmall, gram = kGram;
  int seeding_limit = int(kSeedingLimit), sample = int(kSeedingSample);
  int64_t memory = int64_t(1) << 30; // bytes that a part of a batch may take
};

// Calls f(M, N) with the largest tiles of `rows` and `columns` that leave the device enough of
// them: of 16 M rows there are tiles(M).
template <typename T, typename Tiles, typename F>
void with_tile(
    const KmeansLaunches& on, int rows, int64_t columns, const Tiles& tiles, const F& f) {
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

// Where problems are solved: (problems,) units and (problems, d) centers; null for 1 and 0, where
// points are normalised.
template <typename T>
struct Frames {
  T *unit = nullptr, *center = nullptr;
  double* deviations = nullptr; // (problems, groups of 32 features), see sum_deviations()
};

// The frames that suit points with ids and count, whose `scale` holds their squared norms and will
// hold their units; x gets the centers.
template <typename S, typename T = acc_t<S>>
Frames<T> frame(const KmeansLaunches& on, Points<S>& x, int64_t problems, T* scale) {
  const int64_t groups = whole_blocks(x.d, kWarp);
  const Frames<T> frames{on.scratch.array<T>(problems), on.scratch.array<T>(problems * x.d),
      on.scratch.array<double>(problems * groups)};
  double* const means = on.scratch.array<double>(problems * x.d);
  on.run(choose_units<T>, problems, on.threads, 0, scale, x.rows, nullptr, frames.unit);
  on.run(sum_deviations<S>, problems * groups, on.threads, 0, x, means, frames.deviations);
  on.run(choose_centers<T>, problems, on.threads, 0, means, frames.deviations, x.count, x.d,
      frames.center);
  x.center = frames.center;
  return frames;
}

// Centroids (problems, k, d) as nearest_centroid holds points against them: in a frame that they
// alone decide, lest a row's result depend on other rows.
template <typename T>
struct Placed {
  const T* centroids; // (problems, k, d)
  T *rows, *bias; // (problems, k, d), (problems, k)
  int k, d;
  Frames<T> frames;

  Placed(
      const KmeansLaunches& on, const T* centroids, int64_t problems, int k, int d, bool normalize)
      : centroids(centroids),
        rows(on.scratch.array<T>(problems * k * d)),
        bias(on.scratch.array<T>(problems * k)),
        k(k),
        d(d) {
    if (!normalize) {
      T* const scale = on.scratch.array<T>(problems * k);
      int* const ids = on.scratch.array<int>(problems * k);
      int* const count = on.scratch.array<int>(problems);
      Points<T> x{centroids, k, d, d, k, scale, ids, count};
      on.run(scale_rows<T>, on.blocks(1, problems * k), kPointThreads, 0, x, problems * k, false,
          scale);
      on.run(list_valid_rows<T>, problems, on.threads, 0, scale, k, ids, count, nullptr);
      frames = frame(on, x, problems, scale);
    }
    on.run(place_rows<T>, whole_blocks(problems * k, kPointThreads / kWarp), kPointThreads, 0,
        centroids, problems * k, k, d, frames.unit, frames.center, rows, bias);
  }

  // Of the problems from `first` on, whose points' `scale` is as scale_rows() left it or any unit.
  template <typename S>
  void label(const KmeansLaunches& on, Points<S> x, int64_t first, int64_t problems, T* scale,
      int* found, int64_t* labels, T* distance) const {
    const T* const unit = frames.unit ? frames.unit + first : nullptr;
    if (unit) {
      on.run(choose_units<T>, problems, on.threads, 0, scale, x.rows, unit, nullptr);
      x.center = frames.center + first * d;
    }
    launch_assign<S>(
        on, x, {rows + first * k * d, k, d, d, k}, bias + first * k, problems, 1, nullptr, found);
    x.center = nullptr; // distances are of values as they came, to the last digit
    on.run(write_nearest<S>, whole_blocks(problems * x.capacity, kPointThreads / kWarp),
        kPointThreads, 0, x, problems, centroids + first * k * d, k, unit, found, labels, distance);
  }
};

// Some problems, prepared for clustering.
template <typename S>
class Clustering {
  using T = acc_t<S>;

 public:
  // Rows left out get the label -1, where `labels` is given.
  Clustering(const KmeansLaunches& on, const KmeansInput& in, int64_t* labels)
      : on_(on), batch_(in.batch), normalize_(in.normalize) {
    T* const scale = scale_ = on.scratch.array<T>(batch_ * in.n);
    int* const ids = on.scratch.array<int>(batch_ * in.n);
    int* const count = on.scratch.array<int>(batch_);
    const int n = int(in.n);
    x_ = {(const S*)in.x, in.n, in.stride, int(in.d), n, scale, ids, count};
    on.run(scale_rows<S>, on.blocks(1, batch_ * n), kPointThreads, 0, x_, batch_ * n, in.normalize,
        scale);
    on.run(list_valid_rows<T>, batch_, on.threads, 0, scale, n, ids, count, labels);
    if (!normalize_)
      frames_ = frame(on, x_, batch_, scale);
    pitch_ = whole_blocks(n, kPerUnit<T>) * kPerUnit<T>;
  }

  static int64_t bytes(const KmeansLaunches& on, const KmeansInput& in, const KmeansOptions& o) {
    const int64_t n = in.n, runs = o.restarts;
    const int64_t pieces = std::max<int64_t>(n, o.k) / kPiece + 1 + o.k;
    int64_t values = runs * (pieces * in.d + 4 * n + 3 * o.k * in.d) + 8 * in.d;
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
      x.capacity =
          int(std::max<int64_t>(on_.seeding_limit, seeding_sample(x.rows, o.k, on_.sample)));
      int* const ids = on_.scratch.array<int>(batch_ * x.capacity);
      int* const count = on_.scratch.array<int>(batch_);
      on_.run(sample_points<S>, batch_, on_.threads, 0, x_, on_.seeding_limit, on_.sample, o.k,
          o.seed, x.capacity, ids, count);
      x.ids = ids;
      x.count = count;
      pitch = whole_blocks(x.capacity, kPerUnit<T>) * kPerUnit<T>;
    }
    Scratch& scratch = on_.scratch;
    T* const norm2 = scratch.array<T>(batch_ * x.capacity);
    on_.run(square_norms<S>, whole_blocks(batch_ * x.capacity, kPointThreads), kPointThreads, 0, x,
        batch_, norm2);
    T* const dots = gram ? nullptr : scratch.array<T>(runs * o.trials * pitch);
    Seeding<S> s{
        x, norm2, gram ? products() : dots, gram, pitch, o.k, o.restarts, o.trials, o.seed};
    s.d2 = scratch.array<T>(runs * x.capacity);
    s.shares = scratch.array<double>(runs * s.most_shares());
    s.potential =
        scratch.array<double>(runs * o.trials * Seeding<S>::slices(on_.threads, o.trials));
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
    if (o.tol > 0 && normalize_) {
      const int64_t groups = whole_blocks(d, kWarp);
      frames_.deviations = scratch.array<double>(batch_ * groups);
      on_.run(sum_deviations<S>, batch_ * groups, on_.threads, 0, x_,
          scratch.array<double>(batch_ * d), frames_.deviations);
    }
    l.deviations = frames_.deviations;
    if (start_centroids) {
      T* const placed = scratch.array<T>(runs * k * d);
      on_.run(place_rows<T>, whole_blocks(runs * k, kPointThreads / kWarp), kPointThreads, 0,
          start_centroids, runs * k, k, d, frames_.unit, frames_.center, placed,
          scratch.array<T>(runs * k));
      start_centroids = placed;
    }
    l.rows = rows;
    l.start_centroids = start_centroids;
    l.centroids = scratch.array<T>(runs * k * d);
    l.bias = scratch.array<T>(runs * k);
    l.partial = scratch.array<T>(runs * l.most_pieces() * d);
    l.seen = scratch.array<unsigned long long>(runs * kSeen);
    for (int** labels_of : {&l.label, &l.member, &l.member_before})
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

    const int copiers = on_.blocks(batch_, whole_blocks(int64_t(k) * d, 8 * kWarp));
    on_.run(take_best<S>, batch_ * copiers, kPointThreads, 0, l, frames_.unit, frames_.center,
        centroids, n_iter, copiers);
    T* const distance = scratch.array<T>(batch_ * n);
    const Placed<T> placed(on_, centroids, batch_, k, d, normalize_);
    placed.label(on_, x_, 0, batch_, scale_, scratch.array<int>(batch_ * n), labels, distance);
    on_.run(sum_nearest<S>, batch_, on_.threads, 0, x_, distance, inertia);
  }

 private:
  static bool uses_gram(const KmeansLaunches& on, int64_t n, const KmeansOptions& o) {
    return n <= on.small || (n <= on.gram && n <= int64_t(o.restarts) * o.trials * o.k);
  }

  void iterate(const Lloyd<S>& l, int64_t runs) const {
    const int64_t sums = l.most_pieces() * whole_blocks(x_.d, kSumColumns);
    const int summers = on_.blocks(runs, sums);
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
  bool normalize_;
  Points<S> x_{};
  T* scale_ = nullptr; // of x_, to be written
  Frames<T> frames_;
  T* products_ = nullptr;
};

// f(part, first) on parts of the batch that fit the memory: clustering is apart for each problem.
template <typename S, typename F>
void for_parts(
    const KmeansLaunches& on, const KmeansInput& in, const KmeansOptions& o, const F& f) {
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
inline void nearest_centroid(const KmeansLaunches& on, const KmeansInput& in, const void* centroids,
    int k, int64_t* labels, void* distance) {
  constexpr int64_t most = 1 << 30; // points at a time: they are counted in int
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    const int d = int(in.d);
    const Placed<T> placed(on, (const T*)centroids, in.batch, k, d, in.normalize);
    const int64_t together = in.n <= most ? in.batch : 1; // problems
    const int64_t points = std::min(in.n, most);
    T* const scale = on.scratch.array<T>(together * points);
    int* const found = on.scratch.array<int>(together * points);
    for (int64_t b = 0; b < in.batch; b += together)
      for (int64_t first = 0; first < in.n; first += points) {
        const int64_t n = std::min(points, in.n - first), at = b * in.n + first;
        const Points<S> x{(const S*)in.x + at * in.stride, n, in.stride, d, int(n), scale};
        on.run(scale_rows<S>, on.blocks(1, together * n), kPointThreads, 0, x, together * n,
            in.normalize, scale);
        placed.label(on, x, b, together, scale, found, labels + at, (T*)distance + at);
      }
  });
  on.scratch.release();
}

} // namespace oodk::cuda
