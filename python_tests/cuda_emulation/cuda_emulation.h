// Runs CUDA kernels on the CPU: as much of CUDA as this project's kernels use, for tests.
//
// A C++ compiler that finds this directory before CUDA's compiles the very kernel headers. Their
// launch() ends in cudaLaunchKernelEx() below, which runs the grid (fibres.h): in the order of their
// ids, one block after the other, or, with a seed, several at a time in a random order. What a block
// has written is then hidden from the others until it ends or calls __threadfence() (stores.h).
// Errors of memory show under AddressSanitizer. What is used without having been written shows
// because shared memory, static and dynamic, is filled with `poison` before each block (all ones: a
// NaN, and an index out of range) and asynchronous copies land only when they are waited for. Dynamic
// shared memory is declared as extern __shared__ uint4 shared[] in namespace oodk::cuda.
#pragma once

#include <link.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "fibres.h"
#include "stores.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local // in a function, this is static; with extern, it is not

// --- types --------------------------------------------------------------------------------------

#define EMULATED_VECTORS(T, name)         \
  struct alignas(2 * sizeof(T)) name##2 { \
    T x, y;                               \
  };                                      \
  struct name##3 {                        \
    T x, y, z;                            \
  };                                      \
  struct alignas(16) name##4 {            \
    T x, y, z, w;                         \
  };
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(double, double)
#undef EMULATED_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {
inline uint3 thread_index() {
  const unsigned id = unsigned(current->id);
  return {id % blockDim.x, id / blockDim.x % blockDim.y, id / blockDim.x / blockDim.y};
}
} // namespace emulation
#define threadIdx (emulation::thread_index())

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}

inline float __bfloat162float(__nv_bfloat16 x) {
  return __uint_as_float(unsigned(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  return {uint16_t(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
      : exponent == 0               ? std::ldexp(float(fraction), -24)
                                    : std::ldexp(float(fraction + 1024), exponent - 25);
  return x.bits & 0x8000 ? -size : size;
}
inline __half __float2half_rn(float x) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (!(size < 65520)) // NaN, or rounds to inf
    return {uint16_t(x != x ? 0x7fff : sign | 0x7c00)};
  const int scale = size == 0 ? -24 : std::max(std::ilogb(size) - 10, -24); // of the last bit
  const int fraction = int(std::nearbyint(std::ldexp(size, -scale))); // up to 2048, which carries
  return {uint16_t(sign | (((scale + 24) << 10) + fraction))};
}

// --- barriers, votes, shuffles, reductions ------------------------------------------------------

inline void __syncthreads() {
  emulation::Block::meet("__syncthreads", 0, 0);
}
inline int __syncthreads_count(int predicate) {
  emulation::Block::meet("__syncthreads_*", 0, predicate != 0);
  return emulation::current->trues;
}
inline int __syncthreads_and(int predicate) {
  return !__syncthreads_count(!predicate);
}
inline int __syncthreads_or(int predicate) {
  return __syncthreads_count(predicate) > 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff) {
  emulation::Block::meet("__syncwarp", mask, 0);
}

// The writes of this thread, and those of its block that it has seen, before what it does next.
inline void __threadfence() {
  emulation::Stores::publish();
}

namespace emulation {

inline int lane() {
  return current->id % kWarp;
}

// The value of lane `source`; the own one if that is not among the `width` lanes of the segment.
template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, int width) {
  uint64_t word = 0;
  static_assert(sizeof(T) <= sizeof(word));
  std::memcpy(&word, &value, sizeof(T));
  Block::meet(name, mask, word);
  if (source < 0 || source / width != lane() / width)
    return value;
  std::memcpy(&value, &current->met[size_t(source)], sizeof(T));
  return value;
}

template <typename T>
T reduce(const char* name, unsigned mask, T value, const std::function<T(T, T)>& combine) {
  Block::meet(name, mask, uint64_t(value));
  T result = value;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1 && i != lane())
      result = combine(result, T(current->met[size_t(i)]));
  return result;
}

template <typename T, typename F>
T exchange(T* at, F f) {
  static_assert(std::is_integral_v<T>, "float atomics depend on the order of the threads");
  if (interleaved && pauses() % 4 == 0)
    Block::pause();
  const T old = *at;
  *at = T(f(old));
  Stores::publish(at, sizeof(T)); // atomics are seen by all
  return old;
}

} // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = emulation::lane() / width * width;
  return emulation::shuffle("__shfl_sync", mask, value, first + source % width, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulation::shuffle("__shfl_up_sync", mask, value, emulation::lane() - int(delta), width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulation::shuffle("__shfl_down_sync", mask, value, emulation::lane() + int(delta), width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, emulation::lane() ^ bits, width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = predicate ? 1u << emulation::lane() : 0;
  return emulation::reduce<unsigned>("__ballot_sync", mask, bit, std::bit_or<unsigned>());
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  emulation::Block::meet("__match_any_sync", mask, uint64_t(value));
  unsigned same = 0;
  for (int i = 0; i < emulation::kWarp; ++i)
    if (mask >> i & 1 && T(emulation::current->met[size_t(i)]) == value)
      same |= 1u << i;
  return same;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return emulation::reduce<T>("__reduce_add_sync", mask, value, std::plus<T>());
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  const auto least = [](T a, T b) { return std::min(a, b); };
  return emulation::reduce<T>("__reduce_min_sync", mask, value, least);
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  const auto most = [](T a, T b) { return std::max(a, b); };
  return emulation::reduce<T>("__reduce_max_sync", mask, value, most);
}

// --- integer atomics: a fibre is never interrupted in one ----------------------------------------------

#define EMULATED_ATOMIC(name, result)                                               \
  template <typename T>                                                             \
  T name(T* at, std::type_identity_t<T> value) {                                    \
    return emulation::exchange(at, [=]([[maybe_unused]] T old) { return result; }); \
  }
EMULATED_ATOMIC(atomicAdd, old + value)
EMULATED_ATOMIC(atomicMin, std::min(old, value))
EMULATED_ATOMIC(atomicMax, std::max(old, value))
EMULATED_ATOMIC(atomicAnd, old& value)
EMULATED_ATOMIC(atomicOr, old | value)
EMULATED_ATOMIC(atomicExch, value)
#undef EMULATED_ATOMIC
template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulation::exchange(at, [=](T old) { return old == expected ? value : old; });
}

// --- memory and arithmetic ----------------------------------------------------------------------

#define EMULATED_LOAD(name) \
  template <typename T>     \
  T name(const T* from) {   \
    return *from;           \
  }
EMULATED_LOAD(__ldg)
EMULATED_LOAD(__ldcs)
EMULATED_LOAD(__ldcg)
#undef EMULATED_LOAD
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if ((bytes != 4 && bytes != 8 && bytes != 16) || (uintptr_t(to) | uintptr_t(from)) % bytes)
    throw std::runtime_error("__pipeline_memcpy_async: 4, 8 or 16 aligned bytes expected");
  emulation::current->copies.push_back({to, from, bytes, emulation::current->batch});
}
inline void __pipeline_commit() {
  ++emulation::current->batch;
}
inline void __pipeline_wait_prior(int batches) {
  std::erase_if(emulation::current->copies, [&](const emulation::Copy& copy) {
    const bool due = copy.batch < emulation::current->batch - batches;
    if (due)
      std::memcpy(copy.to, copy.from, copy.bytes);
    return due;
  });
}

// CUDA's, of floats: the other one where one is NaN.
using std::max;
using std::min;
inline float max(float a, float b) {
  return std::fmax(a, b);
}
inline double max(double a, double b) {
  return std::fmax(a, b);
}
inline float min(float a, float b) {
  return std::fmin(a, b);
}
inline double min(double a, double b) {
  return std::fmin(a, b);
}

namespace emulation {
// x, but for the last two bits: as wrong as an approximation may be, and always as wrong.
inline float approximate(float x, float of) {
  if (x == 0 || !std::isfinite(x))
    return x;
  const unsigned noise = std::bit_cast<unsigned>(of) * 2654435761u >> 30; // 0 to 3
  const float y = std::bit_cast<float>(std::bit_cast<unsigned>(x) + (noise == 3 ? -2 : noise - 1));
  return std::isfinite(y) ? y : x;
}
inline float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x;
}
// ex2.approx.ftz.f32, for which common.cuh has exp2f on the CPU.
inline float exp2_approximate(float x) {
  const float of = flushed(x);
  return of == 0 ? 1 : flushed(approximate(std::exp2(of), of));
}
} // namespace emulation
#define exp2f emulation::exp2_approximate

inline float __fdividef(float a, float b) {
  if (std::fabs(b) > 0x1p126f && std::isfinite(b)) // as CUDA's manual has it
    return std::isinf(a) ? NAN : std::copysign(0.f, a) * std::copysign(1.f, b);
  return emulation::approximate(a / b, b);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return unsigned((uint64_t(high) << 32 | low) >> (bits & 31));
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(unsigned(x));
}
inline int __ffs(int x) {
  return x ? std::countr_zero(unsigned(x)) + 1 : 0;
}

// --- the runtime --------------------------------------------------------------------------------

namespace emulation {

constexpr unsigned char poison = 0xff;
constexpr size_t kSharedBytes = 48 << 10; // of a block that has not asked for more

struct Settings { // made by the test
  int processors = 1; // of the device
  unsigned seed = 0; // of the order of blocks and threads; 0: ascending
  bool execute = true; // or only note what is launched
};
inline Settings settings;

inline int device = 0; // the current one

struct Launch {
  uintptr_t kernel; // where in the program
  uint3 grid, block;
  size_t shared; // bytes, dynamic
  const void* stream;
  int device;
};
inline std::vector<Launch> launches;

// Where the program proper lies, since it may be loaded anywhere.
inline uintptr_t program_base() {
  uintptr_t base = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* to) {
        *static_cast<uintptr_t*>(to) = info->dlpi_addr;
        return 1; // the program comes first
      },
      &base);
  return base;
}

// Shared memory is thread-local, and nothing else in a program of the tests is: this system thread's
// storage of the program proper.
struct Storage {
  char* data = nullptr;
  size_t bytes = 0;

  static Storage shared() {
    Storage found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* to) {
          for (int i = 0; i < info->dlpi_phnum; ++i)
            if (info->dlpi_phdr[i].p_type == PT_TLS)
              *static_cast<Storage*>(to) = {
                  static_cast<char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
          return 1; // the program comes first
        },
        &found);
    return found;
  }
};

} // namespace emulation

namespace oodk::cuda { inline thread_local uint4 shared[emulation::kSharedBytes / sizeof(uint4)]; }

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) {
  return "invalid configuration";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::settings.processors;
  return cudaSuccess;
}

namespace emulation {

// Shared memory as one block sees it, static and dynamic, while another has the place.
class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic) {
    const Storage all = Storage::shared();
    char* const shared = reinterpret_cast<char*>(oodk::cuda::shared);
    char* const after = shared + kSharedBytes;
    parts_[0] = {all.data, size_t(shared - all.data)};
    parts_[1] = {shared, dynamic};
    parts_[2] = {after, size_t(all.data + all.bytes - after)};
    ASAN_UNPOISON_MEMORY_REGION(shared, kSharedBytes);
    ASAN_POISON_MEMORY_REGION(shared + dynamic, kSharedBytes - dynamic);
  }
  std::vector<char> fresh() const {
    size_t bytes = 0;
    for (const Storage& part : parts_)
      bytes += part.bytes;
    return std::vector<char>(bytes, char(poison));
  }
  void swap(std::vector<char>& with) const {
    char* at = with.data();
    for (const Storage& part : parts_)
      at = std::swap_ranges(part.data, part.data + part.bytes, at);
  }

 private:
  std::array<Storage, 3> parts_;
};

struct Alive {
  Block block;
  uint3 index;
  std::vector<char> shared;
  Stores stores;
};

constexpr size_t kAlive = 4; // blocks at a time, fewer of more than 256 threads

inline void run_blocks(
    size_t blocks, int threads, size_t dynamic, const std::function<void()>& body) {
  const SharedMemory shared(dynamic);
  std::mt19937 random(settings.seed);
  pauses.seed(settings.seed + 1);
  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), size_t(0));
  if (settings.seed)
    std::shuffle(order.begin(), order.end(), random);
  const size_t most = settings.seed ? std::clamp<size_t>(1024 / size_t(threads), 2, kAlive) : 1;
  interleaved = settings.seed != 0;
  static std::array<Alive, kAlive> places;
  std::vector<Alive*> alive, free;
  for (Alive& place : places)
    free.push_back(&place);
  for (size_t next = 0; next < blocks || !alive.empty();) {
    while (next < blocks && alive.size() < most) {
      Alive* const a = free.back();
      free.pop_back();
      alive.push_back(a);
      const size_t i = order[next++];
      a->index = {unsigned(i % gridDim.x), unsigned(i / gridDim.x % gridDim.y),
          unsigned(i / gridDim.x / gridDim.y)};
      a->shared = shared.fresh();
      a->block.begin(threads, body);
    }
    const size_t which = alive.size() == 1 ? 0 : random() % alive.size();
    Alive* const a = alive[which];
    blockIdx = a->index;
    shared.swap(a->shared);
    if (interleaved)
      a->stores.resume();
    bool more = true;
    for (unsigned steps = 1 + random() % 4; more && (steps > 0 || most == 1); --steps)
      more = a->block.step(random, interleaved);
    if (interleaved)
      a->stores.suspend(!more);
    shared.swap(a->shared);
    if (!more) {
      free.push_back(a);
      alive.erase(alive.begin() + std::ptrdiff_t(which));
    }
  }
  interleaved = false;
}

} // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  using namespace emulation;
  const size_t threads = size_t(config->blockDim.x) * config->blockDim.y * config->blockDim.z;
  const size_t blocks = size_t(config->gridDim.x) * config->gridDim.y * config->gridDim.z;
  if (threads < 1 || threads > 1024 || blocks < 1 || config->dynamicSmemBytes > kSharedBytes)
    return cudaErrorInvalidConfiguration;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  launches.push_back(
      {reinterpret_cast<uintptr_t>(kernel) - program_base(), {gridDim.x, gridDim.y, gridDim.z},
          {blockDim.x, blockDim.y, blockDim.z}, config->dynamicSmemBytes, config->stream, device});
  if (!settings.execute)
    return cudaSuccess;
  const std::function<void()> body = [&] { kernel(arguments...); };
  run_blocks(blocks, int(threads), config->dynamicSmemBytes, body);
  return cudaSuccess;
}
