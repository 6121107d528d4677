// CUDA backend of kmeans_init, kmeans and nearest_centroid. Nothing waits for the GPU unless
// OODK_VALIDATE=1.
#include "ops/kmeans.h"

#include <tuple>

#include "cuda/kmeans/driver.cuh"
#include "cuda/kmeans/launch.h"

namespace oodk {

void cuda::cluster(const Launches& on, const KmeansInput& in, const KmeansOptions& options,
    const int64_t* rows, const void* centroids, const KmeansResults& out) {
  kmeans({on}, in, options, rows, centroids, out);
}

namespace {

Tensor kmeans_init(
    const Tensor& x, int64_t k, int64_t n_init, int64_t n_trials, int64_t seed, bool normalize) {
  const char* op = "kmeans_init";
  const InitArgs args = init_args(x, k, n_init, n_trials);
  cuda::check_candidates(op, n_init, args.trials);
  const cuda::KmeansInput in = cuda::kmeans_input(op, args.problems, normalize);
  cuda::KmeansOptions options{int(k), int(n_init), int(args.trials)};
  options.seed = uint64_t(seed);
  const cuda::OnDevice here(x);
  cuda::TensorScratch scratch(x);
  cuda::kmeans_init({{here.stream, scratch}}, in, options, args.rows.mutable_data_ptr<int64_t>());
  return args.rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kmeans(const Tensor& x, const Tensor& init,
    int64_t max_iter, double tol, bool normalize, bool renormalize) {
  const auto [p, start] = kmeans_args(x, init, max_iter, tol, cuda::validate());
  const cuda::KmeansInput in = cuda::kmeans_input("kmeans", p, normalize);
  const cuda::KmeansOptions options{
      int(start.k), int(start.restarts), 0, int(max_iter), tol, renormalize};
  const KmeansOutput out = new_kmeans_output(p, start.k);
  const void* from = start.tensor.const_data_ptr();
  const cuda::OnDevice here(x);
  cuda::TensorScratch scratch(x);
  cuda::cluster({here.stream, scratch}, in, options, start.rows ? (const int64_t*)from : nullptr,
      start.rows ? nullptr : from, cuda::results(out));
  return {out.centroids, out.labels, out.inertia, out.n_iter};
}

std::tuple<Tensor, Tensor> nearest_centroid(
    const Tensor& x, const Tensor& centroids, bool normalize) {
  const char* op = "nearest_centroid";
  const NearestArgs args = nearest_args(op, x, centroids);
  check_at_least(op, "number of centroids", args.k, 1);
  const Problems p{args.x, args.batch, args.n, args.d, {}};
  const cuda::KmeansInput in = cuda::kmeans_input(op, p, normalize);
  Tensor labels = empty(args.out_sizes, ScalarType::Long, x);
  Tensor distance = empty(args.out_sizes, p.out_type(), x);
  const cuda::OnDevice here(x);
  cuda::TensorScratch scratch(x);
  cuda::nearest_centroid({{here.stream, scratch}}, in, args.centroids.const_data_ptr(), int(args.k),
      labels.mutable_data_ptr<int64_t>(), distance.mutable_data_ptr());
  return {labels, distance};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("kmeans_init", TORCH_BOX(&oodk::kmeans_init));
  m.impl("kmeans", TORCH_BOX(&oodk::kmeans));
  m.impl("nearest_centroid", TORCH_BOX(&oodk::nearest_centroid));
}
