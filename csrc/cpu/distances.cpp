// CPU backend of indexed_distances.
#include "ops/distances.h"

#include <tuple>

#include "cpu/distances_kernel.h"
#include "cpu/parallel.h"

namespace oodk {
namespace {

std::tuple<Tensor, Tensor, Tensor> indexed_distances(
    const Tensor& x, const Tensor& table, const Tensor& index) {
  const char* op = "indexed_distances";
  const DistanceArgs args = distance_args(op, x, table, index);
  check_index(op, args.index, args.table.count);
  const Distances out = new_distances(index, args);
  const void *rows = args.x.tensor.const_data_ptr(), *to = args.table.tensor.const_data_ptr();
  const int64_t* at = args.index.const_data_ptr<int64_t>();
  void *inner = out.inner.mutable_data_ptr(), *l1 = out.l1.mutable_data_ptr(),
       *l2 = out.l2.mutable_data_ptr();
  const DistanceKernels& kernels = OODK_SELECT_KERNELS(distance_kernels);
  if (args.count > 0)
    for_row_blocks(args.x.count, args.x.width * args.count, [&](int64_t begin, int64_t end) {
      kernels.distances(rows, args.x.dtype, args.x.width, args.x.stride, to, args.table.stride, at,
          args.count, begin, end, inner, l1, l2);
    });
  return {out.inner, out.l1, out.l2};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("indexed_distances", TORCH_BOX(&oodk::indexed_distances));
}
