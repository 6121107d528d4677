# torch's headers and library, found by file: find_package(Torch) would demand a CUDA toolkit
# wherever torch itself was built with CUDA. Only the libtorch stable ABI is used, so the version
# found here need not be the one that runs.
set(OODK_TORCH_DIR "$ENV{OODK_TORCH_DIR}" CACHE PATH "Directory of the torch Python package")
set(_torch_hints ${OODK_TORCH_DIR} ${Python_SITEARCH}/torch ${Python_SITELIB}/torch)

find_path(OODK_TORCH_INCLUDE torch/csrc/stable/library.h
  PATHS ${_torch_hints} PATH_SUFFIXES include NO_DEFAULT_PATH)
find_library(OODK_TORCH_LIBRARY torch
  PATHS ${_torch_hints} PATH_SUFFIXES lib NO_DEFAULT_PATH)
find_library(OODK_TORCH_CPU_LIBRARY torch_cpu
  PATHS ${_torch_hints} PATH_SUFFIXES lib NO_DEFAULT_PATH)
if(NOT OODK_TORCH_INCLUDE OR NOT OODK_TORCH_LIBRARY OR NOT OODK_TORCH_CPU_LIBRARY)
  message(FATAL_ERROR "torch >= 2.10 was not found in: ${_torch_hints}. Install it, or set "
    "OODK_TORCH_DIR to the directory of the torch Python package")
endif()

file(READ ${OODK_TORCH_INCLUDE}/torch/headeronly/version.h _version_h)
string(REGEX MATCH "TORCH_VERSION_MAJOR ([0-9]+)" _ "${_version_h}")
set(OODK_TORCH_VERSION ${CMAKE_MATCH_1})
string(REGEX MATCH "TORCH_VERSION_MINOR ([0-9]+)" _ "${_version_h}")
string(APPEND OODK_TORCH_VERSION ".${CMAKE_MATCH_1}")
string(REGEX MATCH "TORCH_VERSION_PATCH ([0-9]+)" _ "${_version_h}")
string(APPEND OODK_TORCH_VERSION ".${CMAKE_MATCH_1}")
message(STATUS "oodkernels: torch ${OODK_TORCH_VERSION} headers in ${OODK_TORCH_INCLUDE}")

add_library(oodk_torch INTERFACE)
target_include_directories(oodk_torch INTERFACE csrc)
target_include_directories(oodk_torch SYSTEM INTERFACE ${OODK_TORCH_INCLUDE})
target_link_libraries(oodk_torch INTERFACE ${OODK_TORCH_CPU_LIBRARY})
# 2.10.0, the oldest torch the built extension runs on (major << 56 | minor << 48).
target_compile_definitions(oodk_torch INTERFACE
  TORCH_TARGET_VERSION=0x020a000000000000 OODK_TORCH_VERSION="${OODK_TORCH_VERSION}"
  OODK_VERSION="${PROJECT_VERSION}"
  OODK_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
