#pragma once

#include <string>

namespace oodk {

// Python's ValueError and TypeError. In a file of their own because they need pybind11, which no
// file that includes torch does; torch has other exceptions end as RuntimeError since 2.15.
[[noreturn]] void throw_value_error(const std::string& message);
[[noreturn]] void throw_type_error(const std::string& message);

// Runs the Python handlers of signals that have come, where this is the main thread, and throws
// what they raise: KeyboardInterrupt after Ctrl-C. Takes the GIL, which an op runs without.
void check_signals();

} // namespace oodk
