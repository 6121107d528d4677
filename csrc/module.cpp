// oodkernels._C: importing it registers the CPU ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/capability.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU ops of oodkernels, registered with torch as torch.ops.oodk.*";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = OODK_VERSION;
        info["compiler"] = OODK_COMPILER;
        info["torch_built"] = OODK_TORCH_VERSION;
        return info;
      },
      "What this module was built from.");
  m.def(
      "cpu_capability", [] { return oodk::name(oodk::cpu_capability()); },
      "The instruction set whose kernels run: baseline, avx2 or avx512.");
  m.def(
      "available_cpu_capabilities",
      [] {
        std::vector<std::string> names;
        for (auto capability : oodk::available_capabilities())
          names.push_back(oodk::name(capability));
        return names;
      },
      "The instruction sets this processor can run, ascending.");
  oodk::cpu_capability(); // a wrong OODK_CPU_CAPABILITY fails here, at import
}
