# pybind11's headers, in a place that stays: pip builds in an environment of a new name each time, and
# what is compiled against headers of another path is compiled again. Only other contents replace them.
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 CONFIG REQUIRED)
set(OODK_PYBIND11_INCLUDE ${PROJECT_BINARY_DIR}/pybind11)
file(GLOB_RECURSE _headers RELATIVE ${pybind11_INCLUDE_DIR} ${pybind11_INCLUDE_DIR}/pybind11/*.h)
foreach(_header ${_headers})
  cmake_path(GET _header PARENT_PATH _directory)
  file(MAKE_DIRECTORY ${OODK_PYBIND11_INCLUDE}/${_directory})
  file(COPY_FILE ${pybind11_INCLUDE_DIR}/${_header} ${OODK_PYBIND11_INCLUDE}/${_header}
    ONLY_IF_DIFFERENT)
endforeach()

# A Python extension module.
function(oodk_add_module name)
  Python_add_library(${name} MODULE WITH_SOABI ${ARGN})
  target_include_directories(${name} SYSTEM PRIVATE ${OODK_PYBIND11_INCLUDE})
endfunction()
