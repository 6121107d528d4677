// CUDA backend of cluster_argmax and dos_select. Nothing waits for the GPU.
#include "ops/dos.h"

#include <tuple>

#include "cuda/dos_kernel.cuh"
#include "cuda/kmeans/launch.h"

namespace oodk {
namespace {

Tensor cluster_argmax(const Tensor& labels, const Tensor& scores, int64_t k, int64_t m) {
  const char* op = "cluster_argmax";
  const ClusterArgs args = cluster_args(op, labels, scores, k, m);
  OODK_CHECK_VALUE(args.n < std::numeric_limits<int32_t>::max(), op,
      ": scores must have fewer than 2^31 - 1 rows on CUDA, got ", args.n);
  auto sizes = leading(labels, 1);
  sizes.insert(sizes.end(), {k, m});
  Tensor out = empty(sizes, ScalarType::Long, labels);
  const cuda::OnDevice here(scores);
  cuda::TensorScratch scratch(scores);
  cuda::cluster_argmax({here.stream, scratch},
      {args.labels.const_data_ptr<int64_t>(), args.scores.tensor.const_data_ptr(),
          args.scores.dtype, args.batch, args.n, args.scores.stride},
      int(k), int(m), out.mutable_data_ptr<int64_t>());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dos_select(const Tensor& features, const Tensor& scores,
    int64_t k, int64_t n_select, int64_t n_init, int64_t max_iter, double tol, int64_t seed,
    std::string mode) {
  const char* op = "dos_select";
  const DosArgs args = dos_args(features, scores, k, n_select, n_init, max_iter, tol, mode);
  const Problems& p = args.problems;
  cuda::check_candidates(op, n_init, args.trials);
  const cuda::KmeansInput in = cuda::kmeans_input(op, p, true);
  const KmeansOutput out = new_kmeans_output(p, k);
  Tensor indices = p.new_output({n_select}, ScalarType::Long);
  const cuda::OnDevice here(features);
  cuda::TensorScratch scratch(features);
  cuda::cluster({here.stream, scratch}, in,
      {int(k), int(n_init), int(args.trials), int(max_iter), tol, false, uint64_t(seed)}, nullptr,
      nullptr, cuda::results(out));
  cuda::select({here.stream, scratch},
      {out.labels.const_data_ptr<int64_t>(), args.scores.tensor.const_data_ptr(), args.scores.dtype,
          p.batch, p.n, args.scores.stride},
      {int(k), int(args.how.m), int(n_select), int(args.how.clusters()),
          args.how.best_clusters_only(), uint64_t(seed)},
      indices.mutable_data_ptr<int64_t>());
  return {indices, out.labels, out.centroids, out.inertia};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("cluster_argmax", TORCH_BOX(&oodk::cluster_argmax));
  m.impl("dos_select", TORCH_BOX(&oodk::dos_select));
}
