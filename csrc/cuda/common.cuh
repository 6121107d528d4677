// What the CUDA kernels share: element types, arithmetic, lanes of a warp, and the launch.
// Kernels see raw pointers and no torch header; what they use of CUDA are functions and types that
// a C++ library can stand in for, so that they also compile for and run on a CPU, in the tests.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/dtype.h"

namespace oodk::cuda {

// --- element types: what is read is float64 or float32, or becomes float32 ----------------------

using Half = __half;
using BFloat16 = __nv_bfloat16;

template <typename S>
using acc_t = std::conditional_t<std::is_same_v<S, double>, double, float>;

__device__ inline float widen(BFloat16 value) {
  return __bfloat162float(value);
}
__device__ inline float widen(Half value) {
  return __half2float(value);
}
__device__ inline float widen(float value) {
  return value;
}
__device__ inline double widen(double value) {
  return value;
}

template <typename S>
__device__ inline S narrow(acc_t<S> value) {
  if constexpr (std::is_same_v<S, BFloat16>)
    return __float2bfloat16_rn(value);
  else if constexpr (std::is_same_v<S, Half>)
    return __float2half_rn(value);
  else
    return value;
}

// Calls f(S{}) with the element type that dtype names.
template <typename F>
void dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Half{});
  }
}

// --- units: 16 bytes, the most that a thread reads or writes at once ----------------------------

template <typename S>
constexpr int kPerUnit = int(sizeof(uint4) / sizeof(S));

template <typename S>
__device__ inline void unpack(uint4 unit, acc_t<S> (&x)[kPerUnit<S>]) {
  if constexpr (std::is_same_v<S, BFloat16>) { // the upper half of a float: one instruction each
    const unsigned words[] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
    }
  } else {
    S packed[kPerUnit<S>];
    memcpy(packed, &unit, sizeof(unit));
#pragma unroll
    for (int e = 0; e < kPerUnit<S>; ++e)
      x[e] = widen(packed[e]);
  }
}

// Bits begin to end - 1: which values of a unit are meant; 0 <= begin <= end < 32.
__device__ inline unsigned columns(int begin, int end) {
  return (1u << end) - (1u << begin);
}

template <typename S>
__device__ inline uint4 pack(const acc_t<S> (&x)[kPerUnit<S>]) {
  S packed[kPerUnit<S>];
#pragma unroll
  for (int e = 0; e < kPerUnit<S>; ++e)
    packed[e] = narrow<S>(x[e]);
  uint4 unit;
  memcpy(&unit, packed, sizeof(unit));
  return unit;
}

// How many values p is past the start of its unit.
template <typename S>
__device__ inline int skew(const S* p) {
  return int(uintptr_t(p) % sizeof(uint4) / sizeof(S));
}

// --- arithmetic ---------------------------------------------------------------------------------

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
template <typename T>
constexpr T kLn2 = T(0.693147180559945309417);
template <typename T>
constexpr T kLog2e = T(1.44269504088896340736);

// 2^x within 2 ulp; 0 below the smallest normal number.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ inline double exp2_fast(double x) {
  return exp2(x);
}

// e^x for x <= 0. In float32 its relative error grows as 2^-24 |x|, as e^x itself falls.
__device__ inline float exp_fast(float x) {
  return exp2_fast(x * kLog2e<float>);
}
__device__ inline double exp_fast(double x) {
  return exp(x);
}

__device__ inline float log_of(float x) {
  return logf(x);
}
__device__ inline double log_of(double x) {
  return log(x);
}

__device__ inline float divide(float a, float b) {
  return __fdividef(a, b);
}
__device__ inline double divide(double a, double b) {
  return a / b;
}

// The larger; the other one where one is NaN.
__device__ inline float larger(float a, float b) {
  return fmaxf(a, b);
}
__device__ inline double larger(double a, double b) {
  return fmax(a, b);
}

// The smaller; the other one where one is NaN.
__device__ inline float smaller(float a, float b) {
  return fminf(a, b);
}
__device__ inline double smaller(double a, double b) {
  return fmin(a, b);
}

// The larger; NaN where either is NaN.
template <typename T>
__device__ inline T larger_or_nan(T a, T b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, float>) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
  }
#endif
  return a > b || a != a ? a : b;
}

// What is subtracted before e^x: the maximum, but 0 where that is -inf, lest -inf - -inf be NaN.
template <typename T>
__device__ inline T shift(T best) {
  return best == -kInf<T> ? T(0) : best;
}

// combine over x[0], x[1] ... in pairs.
template <int N, typename T, typename F>
__device__ inline T fold(const T (&x)[N], F combine) {
  T y[N];
#pragma unroll
  for (int i = 0; i < N; ++i)
    y[i] = x[i];
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i)
      y[i] = combine(y[i], y[i + half]);
  return y[0];
}

// --- lanes --------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

template <typename V, typename F>
__device__ inline V for_each_word(V value, F f) {
  static_assert(sizeof(V) % sizeof(unsigned) == 0 && std::is_trivially_copyable_v<V>);
  unsigned words[sizeof(V) / sizeof(unsigned)];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (unsigned& word : words)
    word = f(word);
  memcpy(&value, words, sizeof(V));
  return value;
}

// The value of the lane `delta` below; the own one where there is none.
template <typename V>
__device__ inline V shuffle_up(V value, int delta) {
  return for_each_word(value, [=](unsigned w) { return __shfl_up_sync(kAllLanes, w, delta); });
}

// The value of the lane `delta` above; the own one where there is none.
template <typename V>
__device__ inline V shuffle_down(V value, int delta) {
  return for_each_word(value, [=](unsigned w) { return __shfl_down_sync(kAllLanes, w, delta); });
}

// --- launch -------------------------------------------------------------------------------------

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) [[unlikely]]
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// The only way from here to the GPU. `shared`: bytes of dynamic shared memory.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
    cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  if (blocks < 1 || blocks > std::numeric_limits<int>::max()) [[unlikely]]
    throw std::runtime_error(
        "launching a CUDA kernel: 1 to 2^31 - 1 blocks expected, got " + std::to_string(blocks));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a CUDA kernel");
}

// Of the current device.
struct Device {
  int processors; // multiprocessors

  static Device current() {
    int device;
    check(cudaGetDevice(&device), "cudaGetDevice");
    Device found;
    check(cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
    return found;
  }
};

} // namespace oodk::cuda
