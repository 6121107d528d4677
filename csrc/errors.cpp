#include "errors.h"

#include <pybind11/pybind11.h>

#include <optional>

namespace oodk {

void throw_value_error(const std::string& message) {
  throw pybind11::value_error(message);
}

void throw_type_error(const std::string& message) {
  throw pybind11::type_error(message);
}

namespace {

// What a handler has raised, on its way through torch, which calls set_error() where it catches it.
struct Raised : pybind11::builtin_exception {
  Raised() : builtin_exception("a signal's handler has raised an exception") {
    PyErr_Fetch(&type, &value, &traceback);
  }
  void set_error() const override {
    PyErr_Restore(type, value, traceback);
  }
  PyObject *type, *value, *traceback;
};

} // namespace

void check_signals() {
  if (!Py_IsInitialized())
    return;
  const PyGILState_STATE state = PyGILState_Ensure();
  std::optional<Raised> raised;
  if (PyErr_CheckSignals() != 0)
    raised.emplace();
  PyGILState_Release(state);
  if (raised)
    throw *raised;
}

} // namespace oodk
