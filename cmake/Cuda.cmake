# oodkernels._cuda, for Turing to Blackwell as far as this nvcc knows them. Binaries run on later
# minor versions of their architecture (sm_80 on 86 and 89); PTX of the newest serves what follows.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES $ENV{CUDAARCHS})
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE _known)
  foreach(_arch 75 80 90 100 120)
    if(_known MATCHES "compute_${_arch}")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${_arch}-real)
      set(_newest ${_arch})
    endif()
  endforeach()
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${_newest}-virtual)
endif()

set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
message(STATUS "oodkernels: CUDA ${CMAKE_CUDA_COMPILER_VERSION} found: building _cuda for "
  "${CMAKE_CUDA_ARCHITECTURES}")

pybind11_add_module(_cuda MODULE NO_EXTRAS
  csrc/cuda/module.cpp
  csrc/errors.cpp
  csrc/cuda/mos.cu
  csrc/cuda/logits.cu
  csrc/cuda/outlier.cu
  csrc/cuda/histogram.cu
  csrc/cuda/roc.cu)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " _architectures)
target_compile_definitions(_cuda PRIVATE USE_CUDA
  OODK_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
  OODK_CUDA_ARCHITECTURES="${_architectures}")
target_compile_options(_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra>)
# libtorch.so pulls in libtorch_cuda under a CUDA torch; a CPU torch at build time has none to name.
target_link_libraries(_cuda PRIVATE oodk_torch -Wl,--no-as-needed ${OODK_TORCH_LIBRARY})
install(TARGETS _cuda LIBRARY DESTINATION oodkernels)
