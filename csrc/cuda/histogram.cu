// CUDA backend of roc_histogram_.
#include "ops/histogram.h"

#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/device.h"
#include "cuda/histogram_kernel.cuh"

namespace oodk {
namespace {

template <typename S>
void launch(const HistogramArgs& args, int64_t* counts, cudaStream_t stream) {
  const HistogramLaunch<S> in{static_cast<const S*>(args.scores.const_data_ptr()), args.row_ptr(),
      args.n, args.row, args.n_rows, args.lookup(), reinterpret_cast<unsigned long long*>(counts),
      args.width};
  constexpr int threads = 256, each = 16; // scores
  const int64_t blocks = (args.n + threads * each - 1) / (threads * each);
  cuda::launch(count_scores<S>, std::clamp<int64_t>(blocks, 1, 4096), threads, 0, stream, in);
}

void roc_histogram_(Tensor counts, const Tensor& table, const Tensor& scores, int64_t side,
    std::optional<Tensor> rows, std::optional<Tensor> atoms) {
  const cuda::OnDevice on(scores);
  const HistogramArgs args = histogram_args(counts, table, scores, side, rows, atoms);
  if (args.n == 0)
    return;
  int64_t* c = counts.mutable_data_ptr<int64_t>();
  switch (args.dtype) {
    case DType::f64: return launch<double>(args, c, on.stream);
    case DType::f32: return launch<float>(args, c, on.stream);
    case DType::bf16: return launch<BFloat16Bits>(args, c, on.stream);
    case DType::f16: return launch<HalfBits>(args, c, on.stream);
  }
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("roc_histogram_", TORCH_BOX(&oodk::roc_histogram_));
}
