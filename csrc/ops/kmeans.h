// Contract of the K-means ops (schemas: library.cpp), shared by the CPU and the CUDA backend.
//
// A problem is N points of d features. Points that hold NaN or inf, or whose squared norm overflows,
// are left out: label -1. With `normalize` a point is divided by its Euclidean norm as it is read; a
// zero point stays zero. Every tie goes to the lowest index. A cluster without any point is unused:
// its centroid is NaN, and nothing is nearest to it. Points that are not normalised are clustered
// relative to a center where they lie far from 0 (common/frame.h). Labels and distances returned are
// those of nearest_centroid, whose center depends on the centroids alone.
#pragma once

#include "stable.h"

#include <cmath>
#include <limits>

namespace oodk {

// A batch of problems: x is (..., N, d).
struct Problems {
  TensorRows x;
  int64_t batch, n, d;
  std::vector<int64_t> batch_sizes; // x.sizes()[:-2]

  ScalarType out_type() const {
    return accumulate_type(x.dtype);
  }
  Tensor new_output(std::initializer_list<int64_t> tail, ScalarType type) const { // (..., *tail)
    auto sizes = batch_sizes;
    sizes.insert(sizes.end(), tail);
    return empty(sizes, type, x.tensor);
  }
  const void* problem(int64_t b) const {
    return (const char*)x.tensor.const_data_ptr() + b * n * x.stride * x.tensor.element_size();
  }
};

inline std::vector<int64_t> leading(const Tensor& t, int64_t drop) {
  const auto sizes = sizes_of(t);
  return {sizes.begin(), sizes.end() - drop};
}

inline Problems problems(const char* op, const char* argument, const Tensor& x) {
  float_dtype(op, argument, x);
  OODK_CHECK_VALUE(
      x.dim() >= 2, op, ": ", argument, " must have shape (..., N, d), got ", shape_of(x));
  const int64_t n = x.size(x.dim() - 2), d = x.size(x.dim() - 1);
  OODK_CHECK_VALUE(
      d >= 1, op, ": ", argument, " must have at least one feature, got shape ", shape_of(x));
  OODK_CHECK_VALUE(n < std::numeric_limits<int32_t>::max(), op, ": ", argument,
      " must have fewer than 2^31 - 1 points, got ", n);
  std::vector<int64_t> batch_sizes = leading(x, 2);
  int64_t batch = 1;
  for (int64_t size : batch_sizes)
    batch *= size;
  return {as_rows(op, argument, x), batch, n, d, std::move(batch_sizes)};
}

inline void check_at_least(const char* op, const char* argument, int64_t value, int64_t least) {
  OODK_CHECK_VALUE(value >= least && value < std::numeric_limits<int32_t>::max(), op, ": ",
      argument, " must be at least ", least, " and less than 2^31 - 1, got ", value);
}

inline void check_tol(const char* op, double tol) {
  OODK_CHECK_VALUE(
      tol >= 0 && std::isfinite(tol), op, ": tol must be finite and at least 0, got ", tol);
}

inline void check_device_of(
    const char* op, const char* argument, const Tensor& t, const char* other, const Tensor& x) {
  OODK_CHECK_VALUE(device_of(t) == device_of(x), op, ": ", argument, " must be on the device of ",
      other, ", ", device_of(x), ", got ", device_of(t));
}

// Candidates a step of greedy k-means++: n_trials, or scikit-learn's 2 + floor(ln k) for 0.
inline int64_t trials(int64_t n_trials, int64_t k) {
  return n_trials ? n_trials : 2 + int64_t(std::log(double(k)));
}

struct InitArgs {
  Problems problems;
  int64_t trials;
  Tensor rows; // the output, (..., n_init, k)
};

inline InitArgs init_args(const Tensor& x, int64_t k, int64_t n_init, int64_t n_trials) {
  const char* op = "kmeans_init";
  Problems p = problems(op, "x", x);
  check_at_least(op, "k", k, 1);
  check_at_least(op, "n_init", n_init, 1);
  check_at_least(op, "n_trials", n_trials, 0);
  Tensor rows = p.new_output({n_init, k}, ScalarType::Long);
  return {std::move(p), trials(n_trials, k), std::move(rows)};
}

// Where Lloyd's iteration starts: rows of x, restarts of them, or centroids.
struct Start {
  Tensor tensor; // (batch..., restarts, k) int64, -1 for an unused cluster; or (batch..., k, d)
  bool rows;
  int64_t restarts, k;
};

inline Start checked_start(const char* op, const Tensor& init, const Problems& p) {
  const bool rows = init.scalar_type() == ScalarType::Long;
  if (!rows)
    float_dtype(op, "init (unless int64 rows of x)", init);
  check_device_of(op, "init", init, "x", p.x.tensor);
  OODK_CHECK_VALUE(init.dim() >= 2 && leading(init, 2) == p.batch_sizes &&
          init.size(init.dim() - 1) >= 1 && init.size(init.dim() - 2) >= 1 &&
          (rows || init.size(init.dim() - 1) == p.d),
      op,
      ": init must be int64 rows of x, shape (..., n_init, k), or centroids, shape (..., k, d), "
      "with the leading dimensions of x, got ",
      shape_of(init), " for x ", shape_of(p.x.tensor));
  const int64_t last = init.size(init.dim() - 1), before = init.size(init.dim() - 2);
  if (rows)
    return {torch::stable::contiguous(init), true, before, last};
  check_at_least(op, "number of init centroids", before, 1);
  return {torch::stable::contiguous(torch::stable::to(init, p.out_type())), false, 1, before};
}

inline void check_start_contents(const char* op, const Start& start, int64_t n) {
  if (!start.rows)
    return;
  const Tensor host =
      start.tensor.is_cpu() ? start.tensor : torch::stable::to(start.tensor, Device("cpu"));
  const int64_t* row = host.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < host.numel(); ++i)
    OODK_CHECK_VALUE(row[i] >= -1 && row[i] < n, op, ": init must hold rows of x, -1..", n - 1,
        ", got ", row[i]);
}

struct KmeansOutput {
  Tensor centroids, labels, inertia, n_iter; // (..., k, d), (..., N), (...,) float64, (...,)
};

inline KmeansOutput new_kmeans_output(const Problems& p, int64_t k) {
  return {p.new_output({k, p.d}, p.out_type()), p.new_output({p.n}, ScalarType::Long),
      p.new_output({}, ScalarType::Double), p.new_output({}, ScalarType::Long)};
}

struct KmeansArgs {
  Problems problems;
  Start start;
};

inline KmeansArgs kmeans_args(
    const Tensor& x, const Tensor& init, int64_t max_iter, double tol, bool check_contents) {
  const char* op = "kmeans";
  Problems p = problems(op, "x", x);
  Start start = checked_start(op, init, p);
  check_at_least(op, "max_iter", max_iter, 0);
  check_tol(op, tol);
  if (check_contents)
    check_start_contents(op, start, p.n);
  return {std::move(p), std::move(start)};
}

// The problems of nearest_centroid: one, however many dimensions x has, where all its points share
// the centroids (k, d); else as many as leading dimensions.
struct NearestArgs {
  TensorRows x;
  Tensor centroids; // (problems, k, d), of x's accumulation type
  int64_t batch, n, d, k;
  std::vector<int64_t> out_sizes; // x.sizes()[:-1]
};

inline NearestArgs nearest_args(const char* op, const Tensor& x, const Tensor& centroids) {
  TensorRows rows = as_rows(op, "x", x);
  float_dtype(op, "centroids", centroids);
  check_device_of(op, "centroids", centroids, "x", x);
  const bool shared = centroids.dim() == 2;
  OODK_CHECK_VALUE(
      rows.width >= 1, op, ": x must have at least one feature, got shape ", shape_of(x));
  OODK_CHECK_VALUE(centroids.dim() >= 2 && centroids.size(centroids.dim() - 1) == rows.width &&
          centroids.size(centroids.dim() - 2) >= 1 &&
          (shared || (x.dim() >= 2 && leading(centroids, 2) == leading(x, 2))),
      op,
      ": centroids must have shape (k, d), or (..., k, d) with the leading dimensions of x, got ",
      shape_of(centroids), " for x ", shape_of(x));
  const int64_t n = shared ? rows.count : x.size(x.dim() - 2);
  int64_t batch = 1;
  for (int64_t size : leading(centroids, 2))
    batch *= size;
  Tensor c = torch::stable::contiguous(torch::stable::to(centroids, accumulate_type(rows.dtype)));
  const int64_t width = rows.width, k = centroids.size(centroids.dim() - 2);
  return {std::move(rows), std::move(c), batch, n, width, k, leading(x, 1)};
}

} // namespace oodk
