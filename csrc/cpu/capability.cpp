#include "capability.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace oodk {

std::string name(Capability capability) {
  switch (capability) {
    case Capability::avx512: return "avx512";
    case Capability::avx2: return "avx2";
    default: return "baseline";
  }
}

std::vector<Capability> available_capabilities() {
  std::vector<Capability> available = {Capability::baseline};
#ifdef OODK_X86_KERNELS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
  if (avx2)
    available.push_back(Capability::avx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    available.push_back(Capability::avx512);
#endif
  return available;
}

static Capability choose() {
  const auto available = available_capabilities();
  const char* asked = std::getenv("OODK_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0')
    return available.back();
  std::string names;
  for (Capability capability : available) {
    if (name(capability) == asked)
      return capability;
    names += (names.empty() ? "" : ", ") + name(capability);
  }
  throw std::invalid_argument(
      "OODK_CPU_CAPABILITY must be one of " + names + " on this processor, got '" + asked + "'");
}

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

} // namespace oodk
