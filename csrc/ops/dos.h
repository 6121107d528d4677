// Contract of cluster_argmax and dos_select (schemas: library.cpp), shared by the CPU and the CUDA
// backend.
//
// Selection, from labels and scores (higher = preferred; NaN counts as -inf; ties: lowest row):
//   m = 1 if k > n_select else n_select / k
//   default:  the m best rows of each cluster; if k > n_select the n_select best of those
//   official: the m best rows of each of the first min(k, n_select) clusters (Jiang et al.'s code)
// The shortfall is filled from the other valid rows, those with the least random_bits(seed, fill, 0,
// 0, row) first. Rows are listed by cluster, the best first, then the fill, then -1.
#pragma once

#include "ops/kmeans.h"

namespace oodk {

struct ClusterArgs {
  Tensor labels; // (..., N) int64, contiguous; outside 0..k-1: in no cluster
  TensorRows scores; // (..., N), one row a problem
  int64_t batch, n;
};

inline ClusterArgs cluster_args(
    const char* op, const Tensor& labels, const Tensor& scores, int64_t k, int64_t m) {
  OODK_CHECK_TYPE(labels.scalar_type() == ScalarType::Long, op, ": labels must be int64, got ",
      torch::headeronly::toString(labels.scalar_type()));
  TensorRows rows = as_rows(op, "scores", scores);
  OODK_CHECK_VALUE(sizes_of(labels) == sizes_of(scores), op,
      ": labels must have the shape of scores, ", shape_of(scores), ", got ", shape_of(labels));
  check_device_of(op, "labels", labels, "scores", scores);
  check_at_least(op, "k", k, 1);
  check_at_least(op, "m", m, 1);
  const int64_t n = rows.width, batch = rows.count;
  return {torch::stable::contiguous(labels), std::move(rows), batch, n};
}

struct Selection {
  int64_t k, n_select, m;
  bool official;

  int64_t clusters() const { // that are visited
    return official && k > n_select ? n_select : k;
  }
  bool best_clusters_only() const {
    return !official && k > n_select;
  }
};

inline Selection checked_selection(
    const char* op, int64_t n, int64_t k, int64_t n_select, const std::string& mode) {
  check_at_least(op, "k", k, 1);
  check_at_least(op, "n_select", n_select, 1);
  OODK_CHECK_VALUE(n_select <= n, op, ": n_select must be at most the number of features' rows, ",
      n, ", got ", n_select);
  OODK_CHECK_VALUE(mode == "default" || mode == "official", op,
      ": mode must be default or official, got ", mode);
  return {k, n_select, k > n_select ? 1 : n_select / k, mode == "official"};
}

// scores (..., N), one a row of features.
inline TensorRows checked_scores(const char* op, const Tensor& scores, const Problems& p) {
  float_dtype(op, "scores", scores);
  OODK_CHECK_VALUE(sizes_of(scores) == leading(p.x.tensor, 1), op,
      ": scores must have shape features.shape[:-1], got ", shape_of(scores), " for features ",
      shape_of(p.x.tensor));
  check_device_of(op, "scores", scores, "features", p.x.tensor);
  return as_rows(op, "scores", scores);
}

struct DosArgs {
  Problems problems;
  TensorRows scores; // (..., N), one a row of features
  Selection how;
  int64_t trials;
};

inline DosArgs dos_args(const Tensor& features, const Tensor& scores, int64_t k, int64_t n_select,
    int64_t n_init, int64_t max_iter, double tol, const std::string& mode) {
  const char* op = "dos_select";
  Problems p = problems(op, "features", features);
  TensorRows rows = checked_scores(op, scores, p);
  const Selection how = checked_selection(op, p.n, k, n_select, mode);
  check_at_least(op, "n_init", n_init, 1);
  check_at_least(op, "max_iter", max_iter, 0);
  check_tol(op, tol);
  return {std::move(p), std::move(rows), how, trials(0, k)};
}

} // namespace oodk
