// What the K-means and DOS bindings share: from tensors to problems, and back.
#pragma once

#include <memory>
#include <numeric>
#include <type_traits>

#include "cpu/kmeans/solver.h"
#include "ops/kmeans.h"

namespace oodk {

template <typename T>
T value_of(const PointSet<T>&);
template <typename Set>
using value_t = decltype(value_of(std::declval<const Set&>()));

// f(b, points) for every problem: many problems a problem a thread, few one after the other.
template <typename F>
void for_problems(const Problems& p, bool normalize, const F& f, bool read_often = true) {
  const auto solve = [&](int64_t begin, int64_t end) {
    const auto one = [&](int64_t b, auto zero) {
      PointSet<decltype(zero)> points(
          p.problem(b), p.x.dtype, p.n, p.d, p.x.stride, normalize, read_often);
      f(b, points);
    };
    for (int64_t b = begin; b < end; ++b)
      p.x.dtype == DType::f64 ? one(b, double{}) : one(b, float{});
  };
  if (p.batch >= int64_t(torch::stable::get_num_threads()))
    parallel_for(0, p.batch, 1, solve);
  else
    solve(0, p.batch);
}

// The products of all points, where they pay.
template <typename T>
std::unique_ptr<Gram<T>> gram_of(const PointSet<T>& x, const Work& work) {
  return gram_pays(x, work) ? std::make_unique<Gram<T>>(x) : nullptr;
}

// The nearest of the centroids (k, d), `stride` apart, to each point, and what nearest_centroid makes
// of them: it reads the centroids alone to say where, lest a row's result depend on other rows.
template <typename T>
class Nearest {
 public:
  Nearest(PointSet<T>& x, const T* centroids, int64_t stride, int64_t k)
      : x_(x), from_(centroids), stride_(stride), label_(x.size()) {
    const int64_t d = x.dim();
    if (!x.normalized())
      x.place(PointSet<T>(centroids, dtype_of<T>, k, d, stride, false, false).own_frame());
    Buffer<T> placed;
    if (!x.frame().identity()) {
      const T unit = x.frame().unit;
      placed = Buffer<T>(k * d);
      scaled_ = Buffer<T>(k * d);
      parallel(k, 4.0 * d, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          const T* row = centroids + c * stride;
          std::transform(row, row + d, scaled_ + c * d, [=](T value) { return value * unit; });
          std::copy_n(row, d, placed + c * d);
          x.frame().enter(placed + c * d, d);
        }
      });
      from_ = scaled_;
      stride_ = d;
    }
    x.assign(Packed<T>(placed ? placed.get() : centroids, stride_, k, d), label_.data());
  }
  const std::vector<int32_t>& label() const {
    return label_;
  }
  Buffer<T> distances() const {
    Buffer<T> distance(x_.size());
    x_.distances_from_origin(label_.data(), from_, stride_, distance);
    const T unit = x_.frame().unit;
    for (int64_t i = 0; i < x_.size() && unit != 1; ++i)
      distance[i] = distance[i] / unit / unit;
    return distance;
  }

 private:
  PointSet<T>& x_;
  const T* from_; // the centroids by the unit alone, `stride_` apart: given, or scaled_
  int64_t stride_;
  Buffer<T> scaled_; // (k, d)
  std::vector<int32_t> label_;
};

// K-means from rows (restarts, k) or centroids (k, d): its centroids where the points came from, and
// the labels that nearest_centroid has for them.
template <typename T>
Fit<T> clustered(PointSet<T>& x, const Gram<T>* gram, const Work& work, const int64_t* rows,
    const T* centroids, const LloydOptions& options) {
  Fit<T> fit = lloyd<T>(x, gram, work, rows, centroids, options);
  if (x.normalized())
    return fit;
  const bool moved = !x.frame().identity();
  for (int64_t c = 0; c < fit.k; ++c)
    x.frame().leave(fit.centroids + c * fit.stride, x.dim());
  const Nearest<T> nearest(x, fit.centroids, fit.stride, fit.k);
  if (moved || !x.frame().identity()) {
    const Buffer<T> distance = nearest.distances();
    fit.label = nearest.label();
    fit.inertia = std::accumulate(distance.get(), distance.get() + x.size(), 0.0);
  }
  return fit;
}

struct KmeansPointers {
  explicit KmeansPointers(const KmeansOutput& out)
      : centroids(out.centroids.mutable_data_ptr()),
        labels(out.labels.mutable_data_ptr<int64_t>()),
        inertia(out.inertia.mutable_data_ptr<double>()),
        n_iter(out.n_iter.mutable_data_ptr<int64_t>()) {}

  template <typename T>
  void write(int64_t b, const PointSet<T>& points, const Fit<T>& fit) const {
    T* c = (T*)centroids + b * fit.k * points.dim();
    for (int64_t i = 0; i < fit.k; ++i)
      std::copy_n(fit.centroids + i * fit.stride, points.dim(), c + i * points.dim());
    int64_t* label = labels + b * points.rows();
    std::fill_n(label, points.rows(), int64_t(-1));
    for (int64_t i = 0; i < points.size(); ++i)
      label[points.row(i)] = fit.label[i];
    inertia[b] = fit.inertia;
    n_iter[b] = fit.n_iter;
  }

  void* centroids;
  int64_t* labels;
  double* inertia;
  int64_t* n_iter;
};

} // namespace oodk
