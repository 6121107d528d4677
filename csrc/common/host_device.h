#pragma once

// Before a function that host code and CUDA kernels call. Where it is also compiled once per
// instruction set it belongs into an unnamed namespace, lest the linker take one build's for all.
#if defined(__CUDACC__)
#define OODK_HOST_DEVICE __host__ __device__
#else
#define OODK_HOST_DEVICE
#endif
