# oodkernels._cuda
if(DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(_why "CMAKE_CUDA_ARCHITECTURES")
elseif(DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES $ENV{CUDAARCHS})
  set(_why "CUDAARCHS")
else()
  include(cmake/Architectures.cmake)
  oodk_default_architectures(${CMAKE_CUDA_COMPILER} CMAKE_CUDA_ARCHITECTURES _why)
endif()

set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
message(STATUS "oodkernels: CUDA ${CMAKE_CUDA_COMPILER_VERSION} found: building _cuda for "
  "${CMAKE_CUDA_ARCHITECTURES} (${_why}; CUDAARCHS=90-real chooses another, ';' between several)")

oodk_add_module(_cuda
  csrc/cuda/module.cpp
  csrc/errors.cpp
  csrc/cuda/mos.cu
  csrc/cuda/logits.cu
  csrc/cuda/energy.cu
  csrc/cuda/features.cu
  csrc/cuda/distances.cu
  csrc/cuda/gen.cu
  csrc/cuda/shape.cu
  csrc/cuda/outlier.cu
  csrc/cuda/histogram.cu
  csrc/cuda/kmeans.cu
  csrc/cuda/neighbors.cu
  csrc/cuda/dos.cu
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
