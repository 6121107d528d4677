// What the K-means and DOS bindings share: from tensors to problems, and back.
#pragma once

#include <memory>
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
void for_problems(const Problems& p, bool normalize, const F& f) {
  const auto solve = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      if (p.x.dtype == DType::f64)
        f(b, PointSet<double>(p.problem(b), p.x.dtype, p.n, p.d, p.x.stride, normalize));
      else
        f(b, PointSet<float>(p.problem(b), p.x.dtype, p.n, p.d, p.x.stride, normalize));
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

// Contiguous rows (n, d), with the kernels' stride.
template <typename T>
struct PaddedRows {
  PaddedRows(const T* from, int64_t n, int64_t d) : stride(row_stride<T>(d)), rows(n * stride) {
    const PointRows source{from, sizeof(T) == 8 ? DType::f64 : DType::f32, d, d};
    kmeans_kernels<T>().load(source, 0, n, rows, stride);
  }
  int64_t stride;
  Buffer<T> rows;
};

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
