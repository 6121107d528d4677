// oodkernels._cuda: importing it registers the CUDA ops.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA ops of oodkernels, registered with torch as torch.ops.oodk.*";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = OODK_VERSION;
        info["compiler"] = OODK_CUDA_VERSION;
        info["architectures"] = OODK_CUDA_ARCHITECTURES;
        info["torch_built"] = OODK_TORCH_VERSION;
        return info;
      },
      "What this module was built from.");
}
