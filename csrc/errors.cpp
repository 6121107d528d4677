#include "errors.h"

#include <pybind11/pybind11.h>

namespace oodk {

void throw_value_error(const std::string& message) {
  throw pybind11::value_error(message);
}

void throw_type_error(const std::string& message) {
  throw pybind11::type_error(message);
}

} // namespace oodk
