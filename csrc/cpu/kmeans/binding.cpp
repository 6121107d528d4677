// CPU backend of kmeans_init, kmeans and nearest_centroid.
#include "ops/kmeans.h"

#include <tuple>

#include "cpu/kmeans/problem.h"

namespace oodk {
namespace {

Tensor kmeans_init(
    const Tensor& x, int64_t k, int64_t n_init, int64_t n_trials, int64_t seed, bool normalize) {
  const InitArgs args = init_args(x, k, n_init, n_trials);
  int64_t* rows = args.rows.mutable_data_ptr<int64_t>();
  Interrupt interrupt;
  for_problems(args.problems, normalize, [&](int64_t b, auto& points) {
    const Work work{k, n_init, args.trials, 0, interrupt};
    points.place(points.own_frame());
    seed_clusters(points, gram_of(points, work).get(), work, seed, rows + b * n_init * k);
  });
  return args.rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kmeans(const Tensor& x, const Tensor& init,
    int64_t max_iter, double tol, bool normalize, bool renormalize) {
  const auto [p, start] = kmeans_args(x, init, max_iter, tol, true);
  const KmeansOutput out = new_kmeans_output(p, start.k);
  const KmeansPointers to(out);
  const void* from = start.tensor.const_data_ptr();
  Interrupt interrupt;
  for_problems(p, normalize, [&](int64_t b, auto& points) {
    using T = value_t<decltype(points)>;
    const Work work{start.k, start.restarts, 0, max_iter, interrupt};
    points.place(points.own_frame());
    const auto* rows = start.rows ? (const int64_t*)from + b * start.restarts * start.k : nullptr;
    const auto* centroids = start.rows ? nullptr : (const T*)from + b * start.k * p.d;
    to.write(b, points,
        clustered<T>(points, gram_of(points, work).get(), work, rows, centroids,
            {max_iter, tol, renormalize}));
  });
  return {out.centroids, out.labels, out.inertia, out.n_iter};
}

std::tuple<Tensor, Tensor> nearest_centroid(
    const Tensor& x, const Tensor& centroids, bool normalize) {
  const NearestArgs args = nearest_args("nearest_centroid", x, centroids);
  const ScalarType type = accumulate_type(args.x.dtype);
  Tensor labels = empty(args.out_sizes, ScalarType::Long, x);
  Tensor distance = empty(args.out_sizes, type, x);
  int64_t* label = labels.mutable_data_ptr<int64_t>();
  void* to = distance.mutable_data_ptr();
  const void* from = args.centroids.const_data_ptr();
  const Problems p{args.x, args.batch, args.n, args.d, {}};
  const auto solve = [&](int64_t b, auto& points) {
    using T = value_t<decltype(points)>;
    const Nearest<T> nearest(points, (const T*)from + b * args.k * args.d, args.d, args.k);
    const std::vector<int32_t>& found = nearest.label();
    const Buffer<T> squared = nearest.distances();
    T* distance_b = (T*)to + b * args.n;
    int64_t* label_b = label + b * args.n;
    std::fill_n(label_b, args.n, int64_t(-1));
    std::fill_n(distance_b, args.n, std::numeric_limits<T>::quiet_NaN());
    for (int64_t i = 0; i < points.size(); ++i)
      if (found[i] >= 0) {
        label_b[points.row(i)] = found[i];
        distance_b[points.row(i)] = squared[i];
      }
  };
  for_problems(p, normalize, solve, /*read_often=*/false);
  return {labels, distance};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("kmeans_init", TORCH_BOX(&oodk::kmeans_init));
  m.impl("kmeans", TORCH_BOX(&oodk::kmeans));
  m.impl("nearest_centroid", TORCH_BOX(&oodk::nearest_centroid));
}
