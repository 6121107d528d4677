#pragma once

#include <string>

namespace oodk {

// Raises Python's TypeError. In a file of its own because it needs pybind11, which no file that
// includes torch does.
[[noreturn]] void throw_type_error(const std::string& message);

} // namespace oodk
