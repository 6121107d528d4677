// CUDA backend of indexed_distances.
#include "ops/distances.h"

#include <tuple>

#include "cuda/device.h"
#include "cuda/distances_kernel.cuh"

namespace oodk {
namespace {

std::tuple<Tensor, Tensor, Tensor> indexed_distances(
    const Tensor& x, const Tensor& table, const Tensor& index) {
  const char* op = "indexed_distances";
  const DistanceArgs args = distance_args(op, x, table, index);
  const cuda::OnDevice on(op, x, "x");
  cuda::check_width(op, args.x.width, "x");
  if (cuda::validate())
    check_index(op, args.index, args.table.count);
  const Distances out = new_distances(index, args);
  if (args.x.count * args.count > 0)
    cuda::indexed_distances(
        {args.x.tensor.const_data_ptr(), args.x.dtype, args.x.count, args.x.width, args.x.stride,
            args.table.tensor.const_data_ptr(), args.table.count, args.table.stride,
            args.index.const_data_ptr<int64_t>(), args.count, on.stream},
        out.inner.mutable_data_ptr(), out.l1.mutable_data_ptr(), out.l2.mutable_data_ptr());
  return {out.inner, out.l1, out.l2};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("indexed_distances", TORCH_BOX(&oodk::indexed_distances));
}
