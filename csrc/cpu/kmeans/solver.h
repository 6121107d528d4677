// K-means on one problem, on torch's threads.
//
// Two ways lead to the same clustering. Where N is not large, all products of points, G = X X^T, are
// computed once, for all restarts. A step of k-means++ then only reads rows of G, and so does Lloyd's:
// a centroid is the mean of its members, so x . c_k is the mean of row x of G over the members of k,
// and from one iteration to the next only clusters that changed need theirs summed again:
//
//   products with the centroids   N d K multiply-adds an iteration
//   sums of rows of G             at most N N additions
//
// Elsewhere points meet packed centroids directly. The labels that are returned always come from
// there: they are those of nearest_centroid for the centroids returned.
//
// All sums are taken in an order that is fixed by the data alone, and the way by the size of the
// problem: the number of threads and the other problems of a batch change no bit. Seeds have the same
// bits either way; Lloyd's rounding differs, within the bound that oodkernels/ops/kmeans.py states.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "common/seeding.h"
#include "cpu/interrupt.h"
#include "cpu/kmeans/kernel.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace oodk {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Values from row to row: whole cache lines, an odd number of them, so that equal columns of
// different rows do not compete for the same place in the cache.
template <typename T>
int64_t row_stride(int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  return (round_up(width, line) / line | 1) * line;
}

// f(begin, end) over ranges of 0..n-1 that are worth a thread each: `work` operations an item.
template <typename F>
void parallel(int64_t n, double work, const F& f) {
  constexpr double least = 1 << 18; // some ten microseconds, about what waking a thread takes
  const int64_t grain = std::max<int64_t>(1, int64_t(least / std::max(work, 1.0)));
  parallel_for(0, n, grain, f);
}

// Centroids as `assign` takes them.
template <typename T>
struct Packed {
  Packed(const T* centroids, int64_t stride, int64_t k, int64_t d)
      : panels((k + kernels.panel - 1) / kernels.panel),
        columns(panels * kernels.panel * d),
        bias(panels * kernels.panel) {
    constexpr T never = -std::numeric_limits<T>::infinity();
    parallel(panels, 4.0 * kernels.panel * d, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kernels.panel, end = last * kernels.panel;
      kernels.pack(
          centroids + begin * stride, stride, std::min(k, end) - begin, d, columns + begin * d);
      for (int64_t c = begin; c < end; ++c) {
        const T norm2 = c < k ? kernels.norm2(centroids + c * stride, d) : 0;
        bias[c] = c < k && std::isfinite(norm2) ? -norm2 / 2 : never;
        if (c < k && !std::isfinite(norm2)) // an unused cluster must not put NaN into its panel
          for (int64_t j = 0; j < d; ++j)
            columns[(c / kernels.panel * d + j) * kernels.panel + c % kernels.panel] = 0;
      }
    });
  }
  const KmeansKernels<T>& kernels = kmeans_kernels<T>();
  int64_t panels;
  Buffer<T> columns, bias;
};

template <typename T>
constexpr DType dtype_of = sizeof(T) == 8 ? DType::f64 : DType::f32;

// Where a problem is solved: at x * unit - center. Far from 0 the products of points drown their
// distances, and near the largest number they overflow.
template <typename T>
struct Frame {
  T unit = 1; // a power of two
  std::vector<T> center; // (d,), or empty for 0

  bool identity() const {
    return unit == 1 && center.empty();
  }
  void enter(T* row, int64_t d) const {
    for (int64_t j = 0; j < d; ++j)
      row[j] = row[j] * unit - (center.empty() ? T(0) : center[j]);
  }
  void leave(T* row, int64_t d) const {
    for (int64_t j = 0; j < d; ++j)
      row[j] = (row[j] + (center.empty() ? T(0) : center[j])) / unit;
  }
};

// The valid rows of a problem, normalised where asked for. They are copied where they are read often
// and fit the caches, else converted piece by piece whenever they are read.
template <typename T>
class PointSet {
 public:
  PointSet(const void* x, DType dtype, int64_t n, int64_t d, int64_t stride, bool normalize,
      bool read_often = true)
      : kernels_(kmeans_kernels<T>()),
        source_{x, dtype, d, stride},
        read_often_(read_often),
        all_(n),
        scale_(n) {
    parallel(n, d, [&](int64_t begin, int64_t end) {
      kernels_.scales(source_, begin, end, normalize, scale_);
    });
    if (normalize)
      source_.scale = scale_.get();
    normalized_ = normalize;
    const auto left_out = [](T scale) { return scale != scale; };
    size_ = std::count_if(scale_.get(), scale_.get() + n, std::not_fn(left_out));
    if (size_ < n) {
      for (int64_t i = 0; i < n; ++i)
        if (!left_out(scale_[i]))
          ids_.push_back(int32_t(i));
      std::remove_if(scale_.get(), scale_.get() + n, left_out);
      source_.ids = ids_.data();
    }
    if (!normalize) {
      largest_ = size_ ? *std::max_element(scale_.get(), scale_.get() + size_) : T(0);
      source_.scale = nullptr;
    }
    copy();
  }
  // Some of the rows of another set, which must outlive this one.
  PointSet(const PointSet& other, const std::vector<int32_t>& positions)
      : kernels_(other.kernels_),
        source_(other.source_),
        frame_(other.frame_),
        all_(other.all_),
        size_(int64_t(positions.size())),
        scale_(size_) {
    for (int64_t i = 0; i < size_; ++i) {
      ids_.push_back(int32_t(other.row(positions[i])));
      scale_[i] = other.scale_[positions[i]];
    }
    source_.ids = ids_.data();
    if (source_.scale)
      source_.scale = scale_.get();
    copy();
  }
  PointSet(const PointSet&) = delete;

  // The frame that suits these rows, which are as they came. Normalised rows stay where they are.
  Frame<T> own_frame() {
    if (normalized_ || size_ == 0)
      return {};
    Frame<T> frame;
    frame.unit = frame_unit(largest_);
    if (frame.unit != 1)
      place(frame);
    const Moments& m = moments();
    double norm2 = 0;
    for (double mean : m.mean)
      norm2 += mean * mean;
    if (is_far(norm2, m.variance))
      frame.center.assign(m.mean.begin(), m.mean.end());
    return frame;
  }
  void place(Frame<T> frame) {
    if (normalized_ || (frame.identity() && frame_.identity()))
      return;
    frame_ = std::move(frame);
    moments_.reset();
    std::fill_n(scale_.get(), size_, frame_.unit);
    source_.scale = frame_.unit == 1 ? nullptr : scale_.get();
    source_.center = frame_.center.empty() ? nullptr : frame_.center.data();
    copy();
  }
  bool normalized() const {
    return normalized_;
  }
  const Frame<T>& frame() const {
    return frame_;
  }

  int64_t size() const {
    return size_;
  }
  int64_t dim() const {
    return source_.d;
  }
  int64_t stride() const {
    return row_stride<T>(source_.d);
  }
  // As the kernels read them.
  const PointRows& points() const {
    return copied_ ? dense_ : source_;
  }
  // Row of the problem that a valid row is, and the reverse (-1 for a row left out).
  int64_t row(int64_t i) const {
    return size_ == all_ ? i : ids_[i];
  }
  int64_t position(int64_t row) const {
    if (size_ == all_)
      return row;
    const auto found = std::lower_bound(ids_.begin(), ids_.end(), int32_t(row));
    return found != ids_.end() && *found == row ? found - ids_.begin() : -1;
  }
  int64_t rows() const { // valid or not
    return all_;
  }

  // The rows [begin, end), stride() apart and followed by zeros up to a whole tile; `scratch` holds
  // them where they are not at hand.
  const T* tiles(int64_t begin, int64_t end, T* scratch) const {
    if (copied_)
      return copy_ + begin * stride();
    const int64_t padded = round_up(end - begin, kernels_.tile);
    kernels_.load(source_, begin, end, scratch, stride());
    std::fill(scratch + (end - begin) * stride(), scratch + padded * stride(), T(0));
    return scratch;
  }
  // Rows that a thread takes at once: whole tiles that stay in its cache, and few enough that all
  // threads get some.
  int64_t block() const {
    constexpr int64_t bytes = 384 << 10; // of a second-level cache of 512 KiB, with some to spare
    const int64_t fit = bytes / (stride() * int64_t(sizeof(T))) / kernels_.tile;
    return std::clamp<int64_t>(std::min(fit, size_ / (16 * kernels_.tile)), 1, 16) * kernels_.tile;
  }
  // Calls f(first, last, rows) on blocks of [0, size), on all threads.
  template <typename F>
  void for_blocks(double work_per_row, const F& f) const {
    const int64_t rows = block(), blocks = (size_ + rows - 1) / rows;
    parallel(blocks, work_per_row * rows, [&](int64_t begin, int64_t end) {
      const Buffer<T> scratch = copied_ ? Buffer<T>() : Buffer<T>(rows * stride());
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * rows, last = std::min(size_, first + rows);
        f(first, last, tiles(first, last, scratch));
      }
    });
  }

  // label[i] = nearest centroid of valid row i.
  void assign(const Packed<T>& to, int32_t* label) const {
    for_blocks(
        double(to.panels) * kernels_.panel * dim(), [&](int64_t begin, int64_t end, const T* x) {
          const int64_t padded = round_up(end - begin, kernels_.tile);
          const Buffer<T> best(padded);
          const Buffer<int32_t> found(padded);
          kernels_.assign(x, stride(), padded / kernels_.tile, dim(), to.columns, to.bias,
              to.panels, found, best);
          std::copy_n(found.get(), end - begin, label + begin);
        });
  }

  void distances(const int32_t* label, const T* centroids, int64_t c_stride, T* distance) const {
    parallel(size_, 2.0 * dim(), [&](int64_t begin, int64_t end) {
      kernels_.distances(points(), begin, end, label, centroids, c_stride, distance);
    });
  }
  // The same from centroids that are not centered: of values as they came, to the last digit.
  void distances_from_origin(
      const int32_t* label, const T* centroids, int64_t c_stride, T* distance) const {
    PointRows rows = source_;
    rows.center = nullptr;
    parallel(size_, 2.0 * dim(), [&](int64_t begin, int64_t end) {
      kernels_.distances(rows, begin, end, label, centroids, c_stride, distance);
    });
  }
  // Sum of squared distances.
  double inertia(const int32_t* label, const T* centroids, int64_t c_stride) const {
    const Buffer<T> distance(size_);
    distances(label, centroids, c_stride, distance);
    double sum = 0;
    for (int64_t i = 0; i < size_; ++i)
      sum += distance[i];
    return sum;
  }
  // Variance of a feature, averaged over the features: the unit of scikit-learn's tol.
  double mean_variance() {
    return moments().variance / double(dim());
  }

 private:
  struct Moments {
    std::vector<double> mean; // (d,)
    double variance; // mean squared distance from it
  };
  const Moments& moments() {
    if (!moments_) {
      moments_.emplace(Moments{std::vector<double>(dim()), 0});
      std::vector<double>& mean = moments_->mean;
      mean = sum_over_rows(dim(), [](const T* row, int64_t d, double* sum) {
        for (int64_t j = 0; j < d; ++j)
          sum[j] += row[j];
      });
      for (double& sum : mean)
        sum /= double(std::max<int64_t>(size_, 1));
      moments_->variance = sum_over_rows(1,
                               [&](const T* row, int64_t d, double* sum) {
                                 for (int64_t j = 0; j < d; ++j)
                                   sum[0] += (row[j] - mean[j]) * (row[j] - mean[j]);
                               })[0] /
          double(std::max<int64_t>(size_, 1));
    }
    return *moments_;
  }
  // Sum of what add(row, d, sum) adds to `width` sums, in the same order on any number of threads.
  template <typename F>
  std::vector<double> sum_over_rows(int64_t width, const F& add) const {
    const int64_t parts = std::clamp<int64_t>(size_ / 1024, 1, 64), stride = this->stride();
    std::vector<double> sums(parts * width);
    parallel(parts, 2.0 * dim() * double(size_) / double(parts), [&](int64_t first, int64_t last) {
      const Buffer<T> scratch(kernels_.tile * stride);
      for (int64_t p = first; p < last; ++p) {
        const int64_t end = (p + 1) * size_ / parts;
        for (int64_t i = p * size_ / parts; i < end; i += kernels_.tile) {
          const int64_t stop = std::min(end, i + kernels_.tile);
          kernels_.load(points(), i, stop, scratch, stride);
          for (int64_t r = i; r < stop; ++r)
            add(scratch + (r - i) * stride, dim(), &sums[p * width]);
        }
      }
    });
    for (int64_t p = 1; p < parts; ++p)
      for (int64_t j = 0; j < width; ++j)
        sums[j] += sums[p * width + j];
    sums.resize(width);
    return sums;
  }

  void copy() {
    constexpr int64_t limit =
        64 << 20; // bytes: about a last-level cache, of which all threads read
    const int64_t padded = round_up(size_, kernels_.tile);
    if (!read_often_ || padded * stride() * int64_t(sizeof(T)) > limit)
      return;
    copy_ = Buffer<T>(padded * stride());
    parallel(size_, 2.0 * dim(), [&](int64_t begin, int64_t end) {
      kernels_.load(source_, begin, end, copy_ + begin * stride(), stride());
    });
    std::fill(copy_ + size_ * stride(), copy_ + padded * stride(), T(0));
    dense_ = {copy_.get(), dtype_of<T>, dim(), stride()};
    copied_ = true;
  }

  const KmeansKernels<T>& kernels_;
  PointRows source_, dense_;
  Frame<T> frame_;
  std::optional<Moments> moments_;
  T largest_ = 0; // squared norm, of rows that are not normalised
  bool read_often_ = true, normalized_ = true;
  int64_t all_, size_ = 0;
  Buffer<T> scale_, copy_;
  std::vector<int32_t> ids_;
  bool copied_ = false;
};

// All products of two points, symmetric, zero in the columns past the last point.
template <typename T>
struct Gram {
  explicit Gram(const PointSet<T>& x);
  const T* row(int64_t i) const {
    return values + i * stride;
  }
  int64_t n, stride;
  Buffer<T> values;
};

// A clustering of the valid rows.
template <typename T>
struct Fit {
  int64_t k, stride;
  Buffer<T> centroids; // (k, stride); NaN where a cluster is unused
  std::vector<int32_t> label;
  double inertia = 0;
  int64_t n_iter = 0;
};

struct LloydOptions {
  int64_t max_iter;
  double tol; // on the sum of squared shifts, in units of the mean variance
  bool renormalize;
};

// What is to be done with a set of points: for each restart k-means++ with so many trials a step (0
// for none), and at most so many iterations of Lloyd's.
struct Work {
  int64_t k, restarts, trials, iterations;
  Interrupt& interrupt;
};

template <typename T>
bool gram_pays(const PointSet<T>& x, const Work& work);

// Greedy k-means++: rows (restarts, k) of the problem, -1 where there are fewer than k valid rows.
// More than kSeedingLimit valid rows are represented by a stratified random sample.
template <typename T>
void seed_clusters(
    const PointSet<T>& x, const Gram<T>* gram, const Work& work, int64_t seed, int64_t* rows);

// The best restart by inertia, from rows of the problem (restarts, k) or centroids (k, d).
template <typename T>
Fit<T> lloyd(PointSet<T>& x, const Gram<T>* gram, const Work& work, const int64_t* rows,
    const T* centroids, LloydOptions options);

} // namespace oodk
