// Which build of the CPU kernels runs: chosen once, by what the processor has and
// OODK_CPU_CAPABILITY allows.
#pragma once

#include <string>
#include <vector>

namespace oodk {

enum class Capability { baseline, avx2, avx512 };

std::string name(Capability capability);
std::vector<Capability> available_capabilities(); // ascending
// Throws std::invalid_argument where OODK_CPU_CAPABILITY names none that is available.
Capability cpu_capability();

// One kernel table per instruction set; a processor without x86 vectors has the baseline alone.
#ifdef OODK_X86_KERNELS
#define OODK_DECLARE_KERNELS(Table, table)         \
  namespace baseline { extern const Table table; } \
  namespace avx2 { extern const Table table; }     \
  namespace avx512 { extern const Table table; }
#define OODK_SELECT_KERNELS(table)                                               \
  (::oodk::cpu_capability() == ::oodk::Capability::avx512        ? avx512::table \
          : ::oodk::cpu_capability() == ::oodk::Capability::avx2 ? avx2::table   \
                                                                 : baseline::table)
#else
#define OODK_DECLARE_KERNELS(Table, table) \
  namespace baseline { extern const Table table; }
#define OODK_SELECT_KERNELS(table) (baseline::table)
#endif

} // namespace oodk
