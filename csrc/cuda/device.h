// Where a CUDA op runs: the device of its tensors, and torch's current stream there.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <limits>
#include <string_view>

#include "stable.h"

namespace oodk::cuda {

class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) { // known to be on CUDA
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  OnDevice(const char* op, const Tensor& t, const char* argument = "logits")
      : OnDevice(checked(op, t, argument)) {}

  cudaStream_t stream;

 private:
  static const Tensor& checked(const char* op, const Tensor& t, const char* argument) {
    OODK_CHECK_VALUE(t.is_cuda(), op, ": ", argument, " must be on a CUDA device, as another ",
        "argument is, got ", device_of(t));
    return t;
  }

  torch::stable::accelerator::DeviceGuard guard_;
};

// Whether to check the contents of index tensors, for which the host has to wait for the device.
inline bool validate() {
  const char* value = std::getenv("OODK_VALIDATE");
  return value && std::string_view(value) == "1";
}

// The kernels count the columns of a row in int.
inline void check_width(const char* op, int64_t width, const char* argument = "logits") {
  constexpr int64_t most = std::numeric_limits<int>::max() / 2;
  OODK_CHECK_VALUE(width <= most, op, ": ", argument, ".size(-1) must be at most ", most,
      " on CUDA, got ", width);
}

} // namespace oodk::cuda
