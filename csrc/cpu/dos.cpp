// CPU backend of cluster_argmax and dos_select.
#include "ops/dos.h"

#include <numeric>
#include <tuple>

#include "cpu/kmeans/problem.h"

namespace oodk {
namespace {

// A row of scores, with -inf for NaN.
template <typename T>
std::vector<T> ranked(const void* scores, DType dtype, int64_t n) {
  std::vector<T> score(n);
  kmeans_kernels<T>().load({scores, dtype, n, n}, 0, 1, score.data(), n);
  for (T& s : score)
    if (s != s)
      s = -std::numeric_limits<T>::infinity();
  return score;
}

// Rows by cluster, of each cluster the m best in order.
template <typename T>
std::vector<std::vector<int64_t>> best_of_clusters(
    const int64_t* label, const std::vector<T>& score, int64_t k, int64_t m) {
  std::vector<std::vector<int64_t>> best(k);
  for (size_t i = 0; i < score.size(); ++i)
    if (label[i] >= 0 && label[i] < k)
      best[label[i]].push_back(int64_t(i));
  const auto better = [&](int64_t a, int64_t b) {
    return score[a] > score[b] || (score[a] == score[b] && a < b);
  };
  for (auto& rows : best) {
    const int64_t kept = std::min<int64_t>(m, int64_t(rows.size()));
    std::partial_sort(rows.begin(), rows.begin() + kept, rows.end(), better);
    rows.resize(kept);
  }
  return best;
}

// f(b, scores as double or float) for every problem.
template <typename F>
void for_score_rows(const TensorRows& scores, const F& f) {
  const char* from = (const char*)scores.tensor.const_data_ptr();
  const int64_t bytes = scores.stride * scores.tensor.element_size();
  parallel_for(0, scores.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      if (scores.dtype == DType::f64)
        f(b, ranked<double>(from + b * bytes, scores.dtype, scores.width));
      else
        f(b, ranked<float>(from + b * bytes, scores.dtype, scores.width));
  });
}

Tensor cluster_argmax(const Tensor& labels, const Tensor& scores, int64_t k, int64_t m) {
  const ClusterArgs args = cluster_args("cluster_argmax", labels, scores, k, m);
  auto sizes = leading(labels, 1);
  sizes.insert(sizes.end(), {k, m});
  Tensor out = empty(sizes, ScalarType::Long, labels);
  const int64_t* label = args.labels.const_data_ptr<int64_t>();
  int64_t* to = out.mutable_data_ptr<int64_t>();
  std::fill_n(to, out.numel(), int64_t(-1));
  for_score_rows(args.scores, [&](int64_t b, const auto& score) {
    const auto best = best_of_clusters(label + b * args.n, score, k, m);
    for (int64_t c = 0; c < k; ++c)
      std::copy(best[c].begin(), best[c].end(), to + (b * k + c) * m);
  });
  return out;
}

// Contract: ops/dos.h.
template <typename T>
void select(const int64_t* label, const std::vector<T>& score, const Selection& how, int64_t seed,
    int64_t* selected) {
  const int64_t n = int64_t(score.size());
  auto best = best_of_clusters(label, score, how.k, how.m);
  best.resize(how.clusters());
  if (how.best_clusters_only()) {
    std::vector<int64_t> order;
    for (int64_t c = 0; c < how.k; ++c)
      if (!best[c].empty())
        order.push_back(c);
    std::stable_sort(order.begin(), order.end(),
        [&](int64_t a, int64_t b) { return score[best[a][0]] > score[best[b][0]]; });
    for (size_t i = how.n_select; i < order.size(); ++i)
      best[order[i]].clear();
  }
  std::vector<bool> taken(n);
  int64_t count = 0;
  for (const auto& rows : best)
    for (int64_t row : rows) {
      selected[count++] = row;
      taken[row] = true;
    }
  std::vector<std::pair<uint64_t, int64_t>> others; // random bits, row
  if (count < how.n_select)
    for (int64_t i = 0; i < n; ++i)
      if (label[i] >= 0 && !taken[i])
        others.emplace_back(random_bits(uint64_t(seed), Stream::fill, 0, 0, uint32_t(i)), i);
  const int64_t fill = std::min(how.n_select - count, int64_t(others.size()));
  std::partial_sort(others.begin(), others.begin() + fill, others.end());
  for (int64_t i = 0; i < fill; ++i)
    selected[count++] = others[i].second;
  std::fill(selected + count, selected + how.n_select, int64_t(-1));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dos_select(const Tensor& features, const Tensor& scores,
    int64_t k, int64_t n_select, int64_t n_init, int64_t max_iter, double tol, int64_t seed,
    std::string mode) {
  const DosArgs args = dos_args(features, scores, k, n_select, n_init, max_iter, tol, mode);
  const Problems& p = args.problems;
  const KmeansOutput out = new_kmeans_output(p, k);
  const KmeansPointers to(out);
  Tensor indices = p.new_output({n_select}, ScalarType::Long);
  int64_t* selected = indices.mutable_data_ptr<int64_t>();
  Interrupt interrupt;
  for_problems(p, true, [&](int64_t b, auto& points) {
    using T = value_t<decltype(points)>;
    const Work work{k, n_init, args.trials, max_iter, interrupt};
    const auto gram = gram_of(points, work);
    std::vector<int64_t> rows(n_init * k);
    seed_clusters(points, gram.get(), work, seed, rows.data());
    to.write(b, points,
        lloyd<T>(points, gram.get(), work, rows.data(), nullptr, {max_iter, tol, false}));
  });
  for_score_rows(args.scores, [&](int64_t b, const auto& score) {
    select(to.labels + b * p.n, score, args.how, seed, selected + b * n_select);
  });
  return {indices, out.labels, out.centroids, out.inertia};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("cluster_argmax", TORCH_BOX(&oodk::cluster_argmax));
  m.impl("dos_select", TORCH_BOX(&oodk::dos_select));
}
