// CUDA backend of nearest_neighbors. Nothing waits for the GPU unless OODK_VALIDATE=1.
#include "ops/neighbors.h"

#include <tuple>

#include "cuda/kmeans/launch.h"
#include "cuda/neighbors_kernel.cuh"

namespace oodk {
namespace {

template <typename T>
int64_t first_nan(const Tensor& scale) {
  const Tensor host = torch::stable::to(scale, Device("cpu"));
  const T* values = host.const_data_ptr<T>();
  return std::find_if(values, values + host.numel(), [](T x) { return x != x; }) - values;
}

std::tuple<Tensor, Tensor> nearest_neighbors(
    const Tensor& queries, const Tensor& bank, int64_t k, bool normalize) {
  const char* op = "nearest_neighbors";
  const NeighborArgs args = neighbor_args(op, queries, bank, k);
  constexpr int64_t most = std::numeric_limits<int>::max() / 2;
  OODK_CHECK_VALUE(args.bank.width <= most && args.bank.count <= most, op,
      ": bank must have at most ", most, " rows and features on CUDA, got ", shape_of(bank));
  const cuda::OnDevice here(queries);
  cuda::TensorScratch scratch(queries);
  const cuda::Launches on{here.stream, scratch};
  const cuda::NeighborInput in{args.queries.tensor.const_data_ptr(),
      args.bank.tensor.const_data_ptr(), args.queries.dtype, args.bank.dtype, args.queries.count,
      args.bank.count, args.queries.stride, args.bank.stride, int(args.bank.width), int(k),
      normalize};
  const bool wide = args.bank.dtype == DType::f64;
  const Tensor scale = empty({args.bank.count}, accumulate_type(args.bank.dtype), bank);
  cuda::bank_scales(on, in, scale.mutable_data_ptr());
  if (cuda::validate())
    check_bank(op, wide ? first_nan<double>(scale) : first_nan<float>(scale), args.bank.count);
  if (args.queries.count > 0)
    cuda::nearest_neighbors(on, in, scale.const_data_ptr(), args.distances.mutable_data_ptr(),
        args.indices.mutable_data_ptr<int64_t>());
  return {args.distances, args.indices};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("nearest_neighbors", TORCH_BOX(&oodk::nearest_neighbors));
}
