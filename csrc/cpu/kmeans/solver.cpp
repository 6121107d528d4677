#include "cpu/kmeans/solver.h"

#include <numeric>
#include <unordered_set>

namespace oodk {
namespace {

// Rows of each cluster, ascending: a stable counting sort of the labels.
struct Members {
  std::vector<int32_t> rows;
  std::vector<int64_t> start; // (k + 1,)

  explicit Members(int64_t k) : start(k + 1) {}
  Members(const std::vector<int32_t>& label, int64_t k) : start(k + 1) {
    for (int32_t c : label)
      if (c >= 0)
        ++start[c + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    rows.resize(start[k]);
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (size_t i = 0; i < label.size(); ++i)
      if (label[i] >= 0)
        rows[next[label[i]]++] = int32_t(i);
  }
  int64_t size(int64_t c) const {
    return start[c + 1] - start[c];
  }
  const int32_t* of(int64_t c) const {
    return rows.data() + start[c];
  }
  bool same(int64_t c, const Members& other) const {
    return size(c) == other.size(c) && std::equal(of(c), of(c) + size(c), other.of(c));
  }
};

// f(c) for all clusters; the threads' shares have about as many members, not clusters.
template <typename F>
void for_clusters(const Members& members, double work_per_member, const F& f) {
  const auto& start = members.start;
  const int64_t k = int64_t(start.size()) - 1, n = start[k];
  const auto first_from = [&](int64_t position) {
    return std::lower_bound(start.begin(), start.begin() + k, position) - start.begin();
  };
  parallel(std::max<int64_t>(n, 1), work_per_member, [&](int64_t begin, int64_t end) {
    const int64_t last = end >= n ? k : first_from(end);
    for (int64_t c = first_from(begin); c < last; ++c)
      f(c);
  });
}

template <typename T>
class Lloyd {
 public:
  Lloyd(const PointSet<T>& x, const Gram<T>* gram, const Work& work, const LloydOptions& options)
      : x_(x),
        gram_(gram),
        k_(work.k),
        stride_(row_stride<T>(x.dim())),
        interrupt_(work.interrupt),
        options_(options),
        members_(k_),
        centroids_(k_ * stride_),
        label_(x.size()) {
    if (gram) {
      sums_ = Buffer<T>(k_ * gram->stride);
      factor_.resize(k_);
    }
  }

  Fit<T> from_rows(const int64_t* rows) {
    std::fill_n(centroids_.get(), k_ * stride_, T(0));
    Members first(k_);
    for (int64_t c = 0; c < k_; ++c) {
      const int64_t at = rows[c] < 0 ? -1 : x_.position(rows[c]);
      if (at >= 0)
        first.rows.push_back(int32_t(at));
      first.start[c + 1] = int64_t(first.rows.size());
    }
    move_to(std::move(first), true);
    return run();
  }

  Fit<T> from_centroids(const T* centroids) {
    for (int64_t c = 0; c < k_; ++c) {
      std::copy_n(centroids + c * x_.dim(), x_.dim(), centroids_ + c * stride_);
      x_.frame().enter(centroids_ + c * stride_, x_.dim());
      std::fill(centroids_ + c * stride_ + x_.dim(), centroids_ + (c + 1) * stride_, T(0));
    }
    return run();
  }

 private:
  Fit<T> run() {
    // Labels that come again, at once or after a few others, are as good as they get: an iteration
    // that gains anything changes them for good. Ties of equal points go round and round else.
    std::unordered_set<uint64_t> seen;
    bool settled = false; // label_ is right for the centroids
    int64_t i = 0;
    while (i < options_.max_iter && x_.size() && !interrupt_.poll()) {
      ++i;
      assign();
      settled = !seen.insert(hash_of(label_)).second;
      if (settled)
        break;
      const bool first = !known_;
      if (move_to(refilled(), first) <= options_.tol)
        break;
    }
    if (!settled)
      assign();
    const double inertia = x_.inertia(label_.data(), centroids_, stride_);
    return {k_, stride_, std::move(centroids_), std::move(label_), inertia, i};
  }

  static uint64_t hash_of(const std::vector<int32_t>& label) {
    uint64_t hash = 0;
    for (int32_t c : label) {
      hash = (hash ^ uint64_t(uint32_t(c))) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 32;
    }
    return hash;
  }

  void assign() {
    if (x_.size() == 0)
      return;
    if (!gram_ || !known_)
      return x_.assign(Packed<T>(centroids_, stride_, k_, x_.dim()), label_.data());
    const auto& kernels = kmeans_kernels<T>();
    std::vector<T> bias(k_);
    for (int64_t c = 0; c < k_; ++c)
      bias[c] = members_.size(c) ? -kernels.norm2(centroids_ + c * stride_, x_.dim()) / 2
                                 : -std::numeric_limits<T>::infinity();
    constexpr int64_t block = KmeansKernels<T>::kBlock;
    parallel((x_.size() + block - 1) / block, double(k_) * block, [&](int64_t begin, int64_t end) {
      kernels.assign_products(sums_, gram_->stride, k_, factor_.data(), bias.data(), begin * block,
          std::min(end * block, x_.size()), label_.data());
    });
  }

  // The members of each cluster by label_, where empty clusters have taken the points that lie
  // farthest from their centroids, from clusters that keep one.
  Members refilled() {
    Members members(label_, k_);
    std::vector<int64_t> empty;
    for (int64_t c = 0; c < k_; ++c)
      if (members.size(c) == 0)
        empty.push_back(c);
    if (empty.empty() || x_.size() == 0)
      return members;
    const Buffer<T> distance(x_.size());
    x_.distances(label_.data(), centroids_, stride_, distance);
    const auto nearer = [&](int32_t a, int32_t b) { // heap order: the farthest, then lowest, on top
      return distance[a] < distance[b] || (distance[a] == distance[b] && a > b);
    };
    std::vector<int32_t> heap(x_.size());
    std::iota(heap.begin(), heap.end(), 0);
    std::make_heap(heap.begin(), heap.end(), nearer);
    std::vector<int64_t> left(k_);
    for (int64_t c = 0; c < k_; ++c)
      left[c] = members.size(c);
    std::vector<int32_t> label = label_;
    for (size_t e = 0; e < empty.size() && !heap.empty();) {
      std::pop_heap(heap.begin(), heap.end(), nearer);
      const int32_t point = heap.back();
      heap.pop_back();
      if (label[point] >= 0 && --left[label[point]] == 0)
        ++left[label[point]]; // the last one stays
      else
        label[point] = int32_t(empty[e++]);
    }
    return Members(label, k_);
  }

  // Centroids of the clusters whose members are new; returns the sum of squared shifts.
  double move_to(Members members, bool all) {
    const auto& kernels = kmeans_kernels<T>();
    const int64_t d = x_.dim();
    std::vector<double> shift(k_);
    const PointRows products =
        gram_ ? PointRows{gram_->values.get(), dtype_of<T>, gram_->n, gram_->stride} : PointRows{};
    for_clusters(members, 4.0 * d + (gram_ ? gram_->n : 0), [&](int64_t c) {
      if (!all && members.same(c, members_))
        return;
      const int64_t count = members.size(c);
      T* centroid = centroids_ + c * stride_;
      const Buffer<T> sum(stride_);
      kernels.sum_rows(x_.points(), members.of(c), count, sum);
      const T divisor = divisor_of(sum, count);
      const bool unused = count == 0 && std::isnan(centroid[0]); // before and now
      for (int64_t j = 0; j < d && !unused; ++j) {
        const T value = sum[j] / divisor;
        shift[c] += double(value - centroid[j]) * double(value - centroid[j]);
        centroid[j] = value;
      }
      std::fill(centroid + d, centroid + stride_, T(0));
      if (gram_) {
        factor_[c] = count ? 1 / divisor : T(0);
        kernels.sum_rows(products, members.of(c), count, sums_ + c * gram_->stride);
      }
    });
    members_ = std::move(members);
    known_ = true;
    double total = 0;
    for (double s : shift)
      total += s;
    return total == total ? total : std::numeric_limits<double>::infinity();
  }

  // The centroid is the sum of its rows divided by this; NaN for an unused cluster.
  T divisor_of(const T* sum, int64_t count) const {
    if (count == 0)
      return std::numeric_limits<T>::quiet_NaN();
    if (!options_.renormalize)
      return T(count);
    const T norm2 = kmeans_kernels<T>().norm2(sum, x_.dim());
    return norm2 > 0 ? std::sqrt(norm2) : T(1);
  }

  const PointSet<T>& x_;
  const Gram<T>* gram_;
  int64_t k_, stride_;
  Interrupt& interrupt_;
  LloydOptions options_;
  Members members_; // whose means the centroids are, where known_
  bool known_ = false;
  Buffer<T> centroids_; // (k, stride)
  std::vector<int32_t> label_;
  Buffer<T> sums_; // (k, gram stride): the sum of the members' rows of G
  std::vector<T> factor_; // centroid = factor * sum of members, but for rounding
};

// One run of greedy k-means++: what it has chosen, and every point's squared distance to that.
template <typename T>
class Seeding {
 public:
  static constexpr int64_t block = KmeansKernels<T>::kBlock;

  Seeding(int64_t n, const T* norm2, int64_t restart, uint64_t seed)
      : n_(n),
        padded_(round_up(n, block)),
        norm2_(norm2),
        restart_(uint32_t(restart)),
        seed_(seed),
        d2_(padded_),
        block_sums_(padded_ / block),
        chosen_(n) {
    std::fill(d2_.get(), d2_ + n, std::numeric_limits<T>::max());
    std::fill(d2_ + n, d2_ + padded_, T(0));
  }

  // Candidates of step t >= 0, distinct or not; one that is certain where no choice is left.
  std::vector<int32_t> candidates(int64_t t, int64_t trials) {
    if (t == 0)
      return {int32_t(draw(0, 0) * double(n_))};
    const double total = std::accumulate(block_sums_.begin(), block_sums_.end(), 0.0);
    if (!(total > 0)) { // every point lies on a centre
      while (chosen_[first_free_])
        ++first_free_;
      return {first_free_};
    }
    std::vector<int32_t> found(trials);
    for (int64_t l = 0; l < trials; ++l)
      found[l] = at(draw(t, l) * total);
    return found;
  }

  double potential(const T* dots, int32_t candidate, int64_t begin, int64_t end) const {
    return kmeans_kernels<T>().potential(dots, norm2_[candidate], norm2_, d2_, begin, end);
  }

  void choose(int32_t candidate, const T* dots) {
    chosen_[candidate] = true;
    kmeans_kernels<T>().absorb(
        dots, norm2_[candidate], norm2_, d2_, 0, padded_, block_sums_.data());
  }

 private:
  double draw(int64_t step, int64_t index) const {
    return uniform(random_bits(seed_, Stream::seeding, restart_, uint32_t(step), uint32_t(index)));
  }

  // The point in whose share of the total of d2 `target` falls.
  int32_t at(double target) const {
    double sum = 0;
    int64_t b = -1, last = -1;
    for (int64_t i = 0; i < padded_ / block; ++i)
      if (block_sums_[i] > 0) {
        last = i;
        if (sum + block_sums_[i] > target) {
          b = i;
          break;
        }
        sum += block_sums_[i];
      }
    if (b < 0)
      b = last;
    int64_t found = -1;
    for (int64_t i = b * block; i < (b + 1) * block; ++i)
      if (d2_[i] > 0) {
        found = i;
        sum += d2_[i];
        if (sum > target)
          break;
      }
    return int32_t(found);
  }

  int64_t n_, padded_;
  const T* norm2_;
  uint32_t restart_;
  uint64_t seed_;
  Buffer<T> d2_;
  std::vector<double> block_sums_;
  std::vector<bool> chosen_;
  int32_t first_free_ = 0;
};

// Points whose potentials are summed at once: whole tiles and whole blocks.
template <typename T>
int64_t seeding_chunk() {
  return std::lcm(kmeans_kernels<T>().tile, KmeansKernels<T>::kBlock);
}

template <typename T>
int64_t least_of(const std::vector<double>& potential) {
  return std::min_element(potential.begin(), potential.end()) - potential.begin();
}

template <typename T>
Buffer<T> zero_padded(int64_t n) {
  Buffer<T> values(n);
  std::fill(values.get(), values + n, T(0));
  return values;
}

template <typename T>
void seed_by_gram(const PointSet<T>& x, const Gram<T>& gram, int64_t steps, const Work& work,
    int64_t seed, int64_t* rows) {
  const int64_t k = work.k, restarts = work.restarts, trials = work.trials;
  const int64_t n = x.size(), chunk = seeding_chunk<T>();
  const int64_t padded = round_up(n, KmeansKernels<T>::kBlock);
  const Buffer<T> norm2 = zero_padded<T>(padded);
  for (int64_t i = 0; i < n; ++i)
    norm2[i] = gram.row(i)[i];
  parallel(restarts, double(n) * k * trials, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Seeding<T> run(n, norm2, r, uint64_t(seed));
      for (int64_t t = 0; t < steps && !work.interrupt.poll(); ++t) {
        const auto candidate = run.candidates(t, trials);
        std::vector<double> potential(candidate.size());
        if (candidate.size() > 1)
          for (size_t l = 0; l < candidate.size(); ++l)
            for (int64_t i = 0; i < padded; i += chunk)
              potential[l] += run.potential(
                  gram.row(candidate[l]), candidate[l], i, std::min(padded, i + chunk));
        const int32_t best = candidate[least_of<T>(potential)];
        run.choose(best, gram.row(best));
        rows[r * k + t] = x.row(best);
      }
    }
  });
}

// All restarts take a step together: their candidates are the columns of one product.
template <typename T>
void seed_by_products(const PointSet<T>& x, int64_t steps, const Work& work, int64_t first_restart,
    int64_t seed, int64_t* rows) {
  const int64_t k = work.k, restarts = work.restarts, trials = work.trials;
  const auto& kernels = kmeans_kernels<T>();
  const int64_t n = x.size(), d = x.dim(), stride = x.stride(), chunk = seeding_chunk<T>();
  const int64_t padded = round_up(n, KmeansKernels<T>::kBlock), chunks = (n + chunk - 1) / chunk;
  const Buffer<T> norm2 = zero_padded<T>(padded);
  x.for_blocks(d, [&](int64_t begin, int64_t end, const T* row) {
    for (int64_t i = begin; i < end; ++i)
      norm2[i] = kernels.norm2(row + (i - begin) * stride, d);
  });
  std::vector<Seeding<T>> runs;
  for (int64_t r = 0; r < restarts; ++r)
    runs.emplace_back(n, norm2, first_restart + r, uint64_t(seed));

  const int64_t most = restarts * trials, columns = round_up(most, kernels.panel);
  const Buffer<T> dots(most * chunks * chunk);
  const int64_t dots_stride = chunks * chunk;
  const Buffer<T> candidate_rows(round_up(most, kernels.tile) * stride), packed(columns * d);
  const Buffer<T> one_row(kernels.tile * stride);
  for (int64_t t = 0; t < steps && !work.interrupt.poll(); ++t) {
    std::vector<int32_t> candidate;
    std::vector<int64_t> first{0}; // of each run
    for (auto& run : runs) {
      const auto found = run.candidates(t, trials);
      candidate.insert(candidate.end(), found.begin(), found.end());
      first.push_back(int64_t(candidate.size()));
    }
    const int64_t count = int64_t(candidate.size());
    const int64_t panels = (count + kernels.panel - 1) / kernels.panel;
    for (int64_t c = 0; c < count; ++c)
      std::copy_n(
          x.tiles(candidate[c], candidate[c] + 1, one_row), stride, candidate_rows + c * stride);
    kernels.pack(candidate_rows, stride, count, d, packed);

    std::vector<double> partial(chunks * count);
    parallel(chunks, double(chunk) * d * count, [&](int64_t begin, int64_t end) {
      const Buffer<T> scratch(chunk * stride), out(kernels.tile * panels * kernels.panel);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t from = b * chunk, to = std::min(n, from + chunk);
        const T* row = x.tiles(from, to, scratch);
        for (int64_t i = from; i < to; i += kernels.tile) {
          kernels.product(
              row + (i - from) * stride, stride, 1, d, packed, panels, out, panels * kernels.panel);
          for (int64_t c = 0; c < count; ++c)
            for (int64_t j = 0; j < kernels.tile; ++j)
              dots[c * dots_stride + i + j] = out[j * panels * kernels.panel + c];
        }
        const int64_t stop = std::min(padded, from + chunk);
        for (size_t r = 0; r < runs.size(); ++r)
          if (first[r + 1] - first[r] > 1)
            for (int64_t c = first[r]; c < first[r + 1]; ++c)
              partial[b * count + c] =
                  runs[r].potential(dots + c * dots_stride, candidate[c], from, stop);
      }
    });
    parallel(restarts, n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        std::vector<double> potential(first[r + 1] - first[r]);
        for (size_t l = 0; l < potential.size(); ++l)
          for (int64_t b = 0; b < chunks; ++b)
            potential[l] += partial[b * count + first[r] + l];
        const int64_t best = first[r] + least_of<T>(potential);
        runs[r].choose(candidate[best], dots + best * dots_stride);
        rows[r * k + t] = x.row(candidate[best]);
      }
    });
  }
}

} // namespace

template <typename T>
Gram<T>::Gram(const PointSet<T>& x) : n(x.size()) {
  const auto& kernels = kmeans_kernels<T>();
  const int64_t d = x.dim(), tile = kernels.tile, panel = kernels.panel;
  stride = row_stride<T>(round_up(n, std::max<int64_t>(panel, KmeansKernels<T>::kBlock)));
  const int64_t tiles = (n + tile - 1) / tile, panels = (n + panel - 1) / panel;
  values = Buffer<T>(tiles * tile * stride);
  const Buffer<T> packed(panels * panel * d), scratch(x.stride() * round_up(n, tile));
  const T* rows = x.tiles(0, n, scratch);
  parallel(panels, double(panel) * d, [&](int64_t begin, int64_t end) {
    kernels.pack(rows + begin * panel * x.stride(), x.stride(),
        std::min(n, end * panel) - begin * panel, d, packed + begin * panel * d);
  });
  // Blocks of tiles are computed from the diagonal to the right, and mirrored. A block is as high as
  // leaves every thread some, so that a panel serves many tiles. A short and a long block make a
  // pair, so that all threads get the same work.
  const int64_t height = std::clamp<int64_t>(tiles / 32, 1, x.block() / tile);
  const int64_t blocks = (tiles + height - 1) / height, pairs = (blocks + 1) / 2;
  const auto first_column = [&](int64_t block) { return block * height * tile / panel * panel; };
  const auto compute = [&](int64_t block) {
    const int64_t t = block * height, from = first_column(block);
    kernels.product(rows + t * tile * x.stride(), x.stride(), std::min(height, tiles - t), d,
        packed + from * d, panels - from / panel, values + t * tile * stride + from, stride);
  };
  parallel(pairs, double(height * tile) * n * d, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      compute(b);
      if (blocks - 1 - b != b)
        compute(blocks - 1 - b);
    }
  });
  parallel(tiles, double(tile) * n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      T* rows = values + t * tile * stride;
      const int64_t count = std::min(tile, n - t * tile);
      for (int64_t j = 0; j < first_column(t / height); ++j)
        for (int64_t i = 0; i < count; ++i)
          rows[i * stride + j] = values[j * stride + t * tile + i];
      for (int64_t i = 0; i < count; ++i)
        std::fill(rows + i * stride + n, rows + (i + 1) * stride, T(0));
    }
  });
}

template <typename T>
bool gram_pays(const PointSet<T>& x, const Work& work) {
  constexpr double most = 256 << 20; // bytes: beyond a few caches its rows come from memory
  constexpr int64_t usual = 10; // iterations until most labels have settled
  const double n = double(x.size()), d = double(x.dim());
  if (n * n * sizeof(T) > most)
    return false;
  const int64_t columns = round_up(work.restarts * work.trials, kmeans_kernels<T>().panel);
  // Whatever max_iter: where two centroids are equally near, products round otherwise than differences,
  // and a run that has settled must not change where it might have gone on for longer.
  const double rounds = work.iterations > 0 ? double(work.restarts * usual) : 0;
  const double direct = n * d * work.k * (double(columns) + rounds);
  // Reading a row of G costs some multiply-adds a value, from the caches that it fits.
  const double products = n * n * d / 2;
  const double reads = 2 * n * (double(work.restarts) * work.k * work.trials + rounds * n);
  return products + reads < direct;
}

template <typename T>
void seed_clusters(
    const PointSet<T>& x, const Gram<T>* gram, const Work& work, int64_t seed, int64_t* rows) {
  const int64_t n = x.size(), k = work.k;
  if (n > kSeedingLimit) {
    std::vector<int32_t> sample(seeding_sample(n, k, kSeedingSample));
    for (size_t j = 0; j < sample.size(); ++j)
      sample[j] = stratified(n, int64_t(sample.size()), int64_t(j),
          random_bits(uint64_t(seed), Stream::sample, 0, 0, uint32_t(j)));
    return seed_clusters<T>(PointSet<T>(x, sample), nullptr, work, seed, rows);
  }
  std::fill_n(rows, work.restarts * k, int64_t(-1));
  const int64_t steps = std::min(k, n);
  if (gram)
    return seed_by_gram(x, *gram, steps, work, seed, rows);
  constexpr int64_t together = 8; // restarts: their products take trials * together * 4 N bytes
  for (int64_t r = 0; r < work.restarts; r += together)
    seed_by_products(x, steps,
        {k, std::min(together, work.restarts - r), work.trials, 0, work.interrupt}, r, seed,
        rows + r * k);
}

template <typename T>
Fit<T> lloyd(PointSet<T>& x, const Gram<T>* gram, const Work& work, const int64_t* rows,
    const T* centroids, LloydOptions options) {
  if (options.tol > 0)
    options.tol *= x.mean_variance();
  std::vector<Fit<T>> fits(work.restarts);
  const auto worse = [](const Fit<T>& a, const Fit<T>& b) { return b.inertia < a.inertia; };
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin, best = begin; r < end; ++r) {
      Lloyd<T> run(x, gram, work, options);
      fits[r] = rows ? run.from_rows(rows + r * work.k) : run.from_centroids(centroids);
      if (r > best) { // of each thread's restarts one keeps its memory
        const bool better = worse(fits[best], fits[r]);
        Fit<T>& loser = fits[better ? best : r];
        loser.centroids = {};
        loser.label = {};
        best = better ? r : best;
      }
    }
  };
  if (gram) // few points: a restart a thread; many: all threads on one restart
    parallel(work.restarts, double(x.size()) * x.size(), some);
  else
    some(0, work.restarts);
  const auto best = std::max_element(fits.begin(), fits.end(), worse);
  if (gram) {
    x.assign(Packed<T>(best->centroids, best->stride, work.k, x.dim()), best->label.data());
    best->inertia = x.inertia(best->label.data(), best->centroids, best->stride);
  }
  return std::move(*best);
}

#define OODK_INSTANTIATE(T)                                                          \
  template struct Gram<T>;                                                           \
  template bool gram_pays<T>(const PointSet<T>&, const Work&);                       \
  template void seed_clusters<T>(                                                    \
      const PointSet<T>&, const Gram<T>*, const Work&, int64_t seed, int64_t* rows); \
  template Fit<T> lloyd<T>(                                                          \
      PointSet<T>&, const Gram<T>*, const Work&, const int64_t*, const T*, LloydOptions);
OODK_INSTANTIATE(float)
OODK_INSTANTIATE(double)

} // namespace oodk
