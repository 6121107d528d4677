// Runs CUDA kernels on the CPU: as much of CUDA as this project's kernels use, for tests.
//
// The kernel headers are compiled by a C++ compiler with this directory before CUDA's on the
// include path; their one launch() ends in cudaLaunchKernelEx() below, which runs the grid block
// by block. A block's threads are fibres of one system thread. A fibre runs until it has to wait
// for others (a barrier, a shuffle, a vote), so that what lies between two such points happens in
// one order of the threads out of many: the order is drawn from a seed, and a kernel that lacks a
// barrier gives different results for different seeds. Memory errors show under AddressSanitizer;
// what is used without having been written shows because shared memory is filled with `poison`
// first (all ones: a NaN, and an index out of range) and asynchronous copies land only when they
// are waited for. Static shared memory works, but is not poisoned.
#pragma once

#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ thread_local // in a function, this is static; with extern, it is not

// --- vector types -------------------------------------------------------------------------------

#define CUDA_EMULATION_VECTORS(scalar, name)         \
  struct alignas(2 * sizeof(scalar)) name##2 {       \
    scalar x, y;                                     \
  };                                                 \
  struct name##3 {                                   \
    scalar x, y, z;                                  \
  };                                                 \
  struct alignas(sizeof(scalar) < 8 ? 4 * sizeof(scalar) : 16) name##4 { \
    scalar x, y, z, w;                               \
  };
CUDA_EMULATION_VECTORS(int, int)
CUDA_EMULATION_VECTORS(unsigned, uint)
CUDA_EMULATION_VECTORS(float, float)
CUDA_EMULATION_VECTORS(double, double)
CUDA_EMULATION_VECTORS(long long, longlong)
#undef CUDA_EMULATION_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// --- half precision -----------------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

namespace emulation {
template <typename To, typename From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
} // namespace emulation

inline float __bfloat162float(__nv_bfloat16 x) {
  return emulation::bit_cast<float>(uint32_t(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = emulation::bit_cast<uint32_t>(x);
  return {uint16_t(x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
      : exponent == 0                    ? std::ldexp(float(fraction), -24)
                                         : std::ldexp(float(fraction + 1024), exponent - 25);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float a = std::fabs(x);
  if (x != x)
    return {0x7fff};
  if (a >= 65520) // rounds to inf
    return {uint16_t(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(a, &exponent);
  const int scale = a == 0 ? -24 : std::max(exponent - 11, -24); // of the last bit kept
  const int fraction = int(std::nearbyint(std::ldexp(a, -scale))); // up to 2048, which carries
  return {uint16_t(sign | (((scale + 24) << 10) + fraction))};
}

// --- fibres -------------------------------------------------------------------------------------

namespace emulation {

constexpr int kWarp = 32;
constexpr unsigned char poison = 0xff;
constexpr size_t kSharedBytes = 228 << 10, kStackBytes = 64 << 10;

// What to emulate; set by the test.
struct Settings {
  int processors = 1, shared_bytes = 228 << 10; // of the device
  unsigned seed = 0; // of the order of threads; 0: ascending
};
inline Settings settings;

// What a thread brings to a warp or block operation, and waits with.
struct Meeting {
  const char* name = nullptr; // nullptr: it is not waiting
  unsigned mask = 0; // lanes that take part; 0: the whole block
  uint64_t value = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int batch;
};

struct Thread {
  ucontext_t context;
  void* fake_stack = nullptr;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  uint3 index{};
  unsigned id = 0; // in its block
  bool done = false;
  Meeting meeting;
  std::array<uint64_t, kWarp> met{}; // what the lanes of the warp brought
  int trues = 0; // threads of the block that brought a value other than 0
  std::vector<Copy> copies;
  int batch = 0;
};

inline Thread* current = nullptr;

class Block {
 public:
  // Runs body() in every thread of one block.
  void run(int threads, const std::function<void()>& body, std::mt19937& random) {
    body_ = &body;
    threads_.resize(threads);
    for (int i = 0; i < threads; ++i)
      start(unsigned(i));
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    while (true) {
      if (settings.seed)
        std::shuffle(order.begin(), order.end(), random);
      bool any = false;
      for (int i : order)
        if (!threads_[i].done && !threads_[i].meeting.name) {
          any = true;
          resume(threads_[i]);
        }
      if (!any && !release())
        return;
    }
  }

  // Called in a thread: waits until all that take part are there.
  static void meet(const char* name, unsigned mask, uint64_t value) {
    current->meeting = {name, mask, value};
    leave(*current, false);
  }

 private:
  void start(unsigned id) {
    Thread& t = threads_[id];
    ASAN_UNPOISON_MEMORY_REGION(t.stack.data(), t.stack.size());
    t.id = id;
    t.done = false;
    t.meeting = {};
    t.copies.clear();
    t.index = {id % blockDim.x, id / blockDim.x % blockDim.y, id / (blockDim.x * blockDim.y)};
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = nullptr;
    makecontext(&t.context, &Block::enter, 0);
  }

  static void enter() {
    finish_switch(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
    (*body_)();
    current->done = true;
    leave(*current, true);
  }

  static void resume(Thread& t) {
    current = &t;
    threadIdx = t.index;
    void* fake_stack = nullptr;
    start_switch(&fake_stack, t.stack.data(), t.stack.size());
    swapcontext(&scheduler_, &t.context);
    finish_switch(fake_stack, nullptr, nullptr);
  }

  static void leave(Thread& t, bool for_good) {
    start_switch(for_good ? nullptr : &t.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
    swapcontext(&t.context, &scheduler_);
    finish_switch(t.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
  }

  // AddressSanitizer has to be told that the stack changes.
  static void start_switch(
      [[maybe_unused]] void** fake, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t n) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, stack, n);
#endif
  }
  static void finish_switch(
      [[maybe_unused]] void* fake, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* n) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, stack, n);
#endif
  }

  // Lets those go on who have all met. False: every thread has ended.
  bool release() {
    const int n = int(threads_.size());
    int waiting = 0, at_barrier = 0, trues = 0;
    const char* barrier = nullptr;
    bool progress = false, same_barrier = true;
    for (int first = 0; first < n; first += kWarp)
      progress |= release_warp(first);
    if (progress)
      return true;
    for (const Thread& t : threads_) {
      waiting += !t.done;
      if (t.done || t.meeting.mask != 0)
        continue;
      ++at_barrier;
      trues += t.meeting.value != 0;
      same_barrier = same_barrier && (!barrier || barrier == t.meeting.name);
      barrier = t.meeting.name;
    }
    if (waiting == 0)
      return false;
    if (at_barrier < n || !same_barrier)
      throw std::runtime_error("deadlock: " + std::to_string(at_barrier) + " of " +
          std::to_string(n) + " threads at " + (barrier ? barrier : "a barrier") + ", " +
          std::to_string(n - waiting) + " have ended");
    for (Thread& t : threads_) {
      t.trues = trues;
      t.meeting = {};
    }
    return true;
  }

  bool release_warp(int first) {
    bool progress = false;
    const int lanes = std::min(kWarp, int(threads_.size()) - first);
    for (int i = 0; i < lanes; ++i) {
      const Meeting meeting = threads_[first + i].meeting;
      if (!meeting.name || meeting.mask == 0)
        continue;
      bool complete = true;
      std::array<uint64_t, kWarp> met;
      met.fill(~uint64_t(0));
      for (int j = 0; j < kWarp; ++j)
        if (meeting.mask >> j & 1) {
          complete = complete && j < lanes && threads_[first + j].meeting.name == meeting.name &&
              threads_[first + j].meeting.mask == meeting.mask;
          if (complete)
            met[j] = threads_[first + j].meeting.value;
        }
      if (!complete)
        continue;
      for (int j = 0; j < lanes; ++j)
        if (meeting.mask >> j & 1) {
          threads_[first + j].met = met;
          threads_[first + j].meeting = {};
        }
      progress = true;
    }
    return progress;
  }

  static inline ucontext_t scheduler_;
  static inline const void* scheduler_stack_ = nullptr;
  static inline size_t scheduler_stack_bytes_ = 0;
  static inline const std::function<void()>* body_ = nullptr;
  std::vector<Thread> threads_;
};

} // namespace emulation

// --- block and warp operations ------------------------------------------------------------------

inline void __syncthreads() {
  emulation::Block::meet("__syncthreads", 0, 0);
}
inline int __syncthreads_count(int predicate) {
  emulation::Block::meet("__syncthreads_count", 0, predicate != 0);
  return emulation::current->trues;
}
inline int __syncthreads_and(int predicate) {
  emulation::Block::meet("__syncthreads_and", 0, predicate != 0);
  return emulation::current->trues == int(blockDim.x * blockDim.y * blockDim.z);
}
inline int __syncthreads_or(int predicate) {
  emulation::Block::meet("__syncthreads_or", 0, predicate != 0);
  return emulation::current->trues > 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff) {
  emulation::Block::meet("__syncwarp", mask, 0);
}
inline void __threadfence_block() {}
inline void __threadfence() {}

namespace emulation {

inline int lane() {
  return int(current->id % kWarp);
}

// The value that lane `source` brought; the own one where `source` is outside the segment.
template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, int width, bool inside) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  Block::meet(name, mask, word);
  const int first = lane() / width * width;
  if (!inside || source < first || source >= first + width)
    return value;
  T result;
  std::memcpy(&result, &current->met[source], sizeof(T));
  return result;
}

template <typename F>
unsigned reduce(const char* name, unsigned mask, unsigned value, F combine) {
  Block::meet(name, mask, value);
  bool first = true;
  unsigned result = 0;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) {
      const unsigned v = unsigned(current->met[i]);
      result = first ? v : combine(result, v);
      first = false;
    }
  return result;
}

} // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = emulation::lane() / width * width;
  return emulation::shuffle("__shfl_sync", mask, value, first + source % width, width, true);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulation::shuffle(
      "__shfl_up_sync", mask, value, emulation::lane() - int(delta), width, true);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulation::shuffle(
      "__shfl_down_sync", mask, value, emulation::lane() + int(delta), width, true);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, emulation::lane() ^ bits, width, true);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulation::reduce("__ballot_sync", mask, predicate ? 1u << emulation::lane() : 0,
      [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
inline unsigned __activemask() {
  return 0xffffffff;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulation::reduce(
      "__reduce_add_sync", mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return emulation::reduce(
      "__reduce_min_sync", mask, value, [](unsigned a, unsigned b) { return std::min(a, b); });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return emulation::reduce(
      "__reduce_max_sync", mask, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return int(__reduce_add_sync(mask, unsigned(value)));
}
inline int __reduce_min_sync(unsigned mask, int value) { // the sign bit turned: order is kept
  return int(__reduce_min_sync(mask, unsigned(value) ^ 0x80000000) ^ 0x80000000);
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return int(__reduce_max_sync(mask, unsigned(value) ^ 0x80000000) ^ 0x80000000);
}

// --- atomics: no fibre is ever interrupted ------------------------------------------------------

namespace emulation {
template <typename T, typename F>
T exchange(T* at, F f) {
  static_assert(std::is_integral_v<T>, "float atomics depend on the order of the threads");
  const T old = *at;
  *at = f(old);
  return old;
}
} // namespace emulation

template <typename T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  return emulation::exchange(at, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicMin(T* at, std::type_identity_t<T> value) {
  return emulation::exchange(at, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  return emulation::exchange(at, [=](T old) { return value > old ? value : old; });
}
template <typename T>
T atomicAnd(T* at, std::type_identity_t<T> value) {
  return emulation::exchange(at, [=](T old) { return T(old & value); });
}
template <typename T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  return emulation::exchange(at, [=](T old) { return T(old | value); });
}
template <typename T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  return emulation::exchange(at, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulation::exchange(at, [=](T old) { return old == expected ? value : old; });
}

// --- memory and arithmetic ----------------------------------------------------------------------

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

// The bytes arrive when they are waited for, not before.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if ((bytes != 4 && bytes != 8 && bytes != 16) || uintptr_t(to) % bytes || uintptr_t(from) % bytes)
    throw std::runtime_error("__pipeline_memcpy_async: 4, 8 or 16 aligned bytes expected");
  emulation::current->copies.push_back({to, from, bytes, emulation::current->batch});
}
inline void __pipeline_commit() {
  ++emulation::current->batch;
}
inline void __pipeline_wait_prior(int batches) {
  auto& t = *emulation::current;
  std::erase_if(t.copies, [&](const emulation::Copy& copy) {
    if (copy.batch >= t.batch - batches)
      return false;
    std::memcpy(copy.to, copy.from, copy.bytes);
    return true;
  });
}

#define CUDA_EMULATION_MIN_MAX(T)     \
  constexpr T min(T a, T b) {         \
    return b < a ? b : a;             \
  }                                   \
  constexpr T max(T a, T b) {         \
    return a < b ? b : a;             \
  }
CUDA_EMULATION_MIN_MAX(int)
CUDA_EMULATION_MIN_MAX(unsigned)
CUDA_EMULATION_MIN_MAX(long)
CUDA_EMULATION_MIN_MAX(unsigned long)
CUDA_EMULATION_MIN_MAX(long long)
CUDA_EMULATION_MIN_MAX(unsigned long long)
#undef CUDA_EMULATION_MIN_MAX

inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
inline int __float_as_int(float x) {
  return emulation::bit_cast<int>(x);
}
inline unsigned __float_as_uint(float x) {
  return emulation::bit_cast<unsigned>(x);
}
inline float __int_as_float(int x) {
  return emulation::bit_cast<float>(x);
}
inline float __uint_as_float(unsigned x) {
  return emulation::bit_cast<float>(x);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(unsigned(x)) : 32;
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}

// --- the runtime --------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::settings.processors
                                                        : emulation::settings.shared_bytes;
  return cudaSuccess;
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute, int) {
  return cudaSuccess;
}

// The kernels' dynamic shared memory, which they declare as extern __shared__ uint4 shared[].
namespace oodk::cuda {
inline thread_local uint4 shared[emulation::kSharedBytes / sizeof(uint4)];
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  using namespace emulation;
  const dim3 grid = config->gridDim, size = config->blockDim;
  const size_t threads = size_t(size.x) * size.y * size.z;
  if (threads < 1 || threads > 1024 || grid.x < 1 || grid.y < 1 || grid.z < 1 ||
      grid.x > 0x7fffffff || config->dynamicSmemBytes > 48 << 10)
    return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = size;
  std::mt19937 random(settings.seed);
  std::vector<size_t> order(size_t(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), size_t(0));
  if (settings.seed)
    std::shuffle(order.begin(), order.end(), random);
  const std::function<void()> body = [&] { kernel(arguments...); };
  static Block block;
  char* const shared = reinterpret_cast<char*>(oodk::cuda::shared);
  for (const size_t i : order) {
    blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
        unsigned(i / grid.x / grid.y)};
    ASAN_UNPOISON_MEMORY_REGION(shared, kSharedBytes);
    std::memset(shared, poison, kSharedBytes);
    ASAN_POISON_MEMORY_REGION(
        shared + config->dynamicSmemBytes, kSharedBytes - config->dynamicSmemBytes);
    block.run(int(threads), body, random);
  }
  return cudaSuccess;
}
