// How the ops that take more than one kernel launch them.
#pragma once

#include <algorithm>

#include "cuda/common.cuh"

namespace oodk::cuda {

// Device memory for the duration of a call.
class Scratch {
 public:
  virtual ~Scratch() = default;
  template <typename V>
  V* array(int64_t size) {
    return static_cast<V*>(bytes(size_t(std::max<int64_t>(size, 1)) * sizeof(V)));
  }
  virtual void release() = 0; // all of it: what is launched after may have the memory

 private:
  virtual void* bytes(size_t) = 0;
};

constexpr int kPointThreads = 256; // of kernels with a warp an item, which need no other warp
constexpr int kBlockThreads = 512; // of kernels with a block a problem: 128 registers a thread

inline int64_t whole_blocks(int64_t items, int64_t each) {
  return (items + each - 1) / each;
}

struct Launches {
  cudaStream_t stream;
  Scratch& scratch;
  Device device = Device::current();
  int threads = kBlockThreads; // of kernels with a block a problem

  template <typename... Parameters>
  void run(void (*kernel)(Parameters...), int64_t blocks, int threads_of_block, size_t shared,
      std::type_identity_t<Parameters>... arguments) const {
    if (blocks > 0)
      launch(kernel, blocks, threads_of_block, shared, stream, arguments...);
  }
  // Blocks of kPointThreads for each of `groups`, with so many warps' worth of work in each.
  int blocks(int64_t groups, int64_t warps) const {
    const int64_t most = int64_t(device.processors) * 16 / std::max<int64_t>(1, groups);
    return int(std::clamp<int64_t>(
        whole_blocks(warps, kPointThreads / kWarp), 1, std::max<int64_t>(1, most)));
  }
};

// --- what K-means is called with -----------------------------------------------------------------

// Problems: (batch, n, d) values, `stride` from row to row.
struct KmeansInput {
  const void* x;
  DType dtype;
  int64_t batch, n, d, stride;
  bool normalize;
};

struct KmeansOptions {
  int k, restarts, trials = 0, max_iter = 0;
  double tol = 0;
  bool renormalize = false;
  uint64_t seed = 0;
};

// (batch, k, d), (batch, n), (batch,), (batch,)
struct KmeansResults {
  void* centroids;
  int64_t* labels;
  double* inertia;
  int64_t* n_iter;
};

} // namespace oodk::cuda
