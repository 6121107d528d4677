// CUDA backend of roc_histogram_.
#include "ops/histogram.h"

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/device.h"
#include "cuda/histogram_kernel.cuh"

namespace oodk::cuda {
namespace {

template <typename S>
void count(const HistogramArgs& args, int64_t* counts, cudaStream_t stream) {
  const HistogramLaunch<S> in{static_cast<const S*>(args.scores.const_data_ptr()), args.row_ptr(),
      args.n, args.row, args.n_rows, args.lookup(), reinterpret_cast<unsigned long long*>(counts),
      args.width};
  constexpr int each = 16; // scores of a thread
  const int64_t blocks = (args.n + kHistogramThreads * each - 1) / (kHistogramThreads * each);
  launch(count_scores<S>, std::clamp<int64_t>(blocks, 1, 4096), kHistogramThreads, 0, stream, in);
}

void roc_histogram_(Tensor counts, const Tensor& table, const Tensor& scores, int64_t side,
    std::optional<Tensor> rows, std::optional<Tensor> atoms) {
  const HistogramArgs args = histogram_args(counts, table, scores, side, rows, atoms);
  const OnDevice on(scores); // all are where counts is, or histogram_args() has thrown
  if (args.n == 0)
    return;
  int64_t* c = counts.mutable_data_ptr<int64_t>();
  dispatch(args.dtype, [&](auto zero) { count<decltype(zero)>(args, c, on.stream); });
}

} // namespace
} // namespace oodk::cuda

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("roc_histogram_", TORCH_BOX(&oodk::cuda::roc_histogram_));
}
