// CUDA backend of roc_histogram_.
#include "ops/histogram.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>

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
  count_scores<S><<<int(std::clamp<int64_t>(blocks, 1, 4096)), threads, 0, stream>>>(in);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(concat("roc_histogram_: ", cudaGetErrorString(error)));
}

void roc_histogram_(Tensor counts, const Tensor& table, const Tensor& scores, int64_t side,
    std::optional<Tensor> rows, std::optional<Tensor> atoms) {
  const HistogramArgs args = histogram_args(counts, table, scores, side, rows, atoms);
  if (args.n == 0)
    return;
  const int32_t device = scores.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  int64_t* c = counts.mutable_data_ptr<int64_t>();
  const auto s = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::f64: return launch<double>(args, c, s);
    case DType::f32: return launch<float>(args, c, s);
    case DType::bf16: return launch<BFloat16Bits>(args, c, s);
    case DType::f16: return launch<HalfBits>(args, c, s);
  }
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("roc_histogram_", TORCH_BOX(&oodk::roc_histogram_));
}
