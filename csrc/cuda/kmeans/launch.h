// What the K-means and DOS bindings share: from tensors to what the launches take.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cuda/device.h"
#include "cuda/launches.cuh"
#include "ops/kmeans.h"

namespace oodk::cuda {

// Memory of torch's allocator, which gets it back in the order of the stream, or into a graph's
// pool. A few large tensors: a call needs dozens of arrays, and each tensor takes the host's time.
class TensorScratch : public Scratch {
 public:
  explicit TensorScratch(const Tensor& like) : like_(like) {}
  void release() override {
    tensors_.clear();
    left_ = 0;
  }

 private:
  void* bytes(size_t size) override {
    constexpr int64_t line = 256; // to which the allocator aligns, too
    constexpr int64_t least = 4 << 20; // bytes: one tensor for all arrays of a small call
    const int64_t wanted = (int64_t(size) + line - 1) / line * line;
    if (wanted > left_) {
      left_ = std::max(wanted, least);
      tensors_.push_back(empty({left_}, ScalarType::Byte, like_));
      next_ = static_cast<char*>(tensors_.back().mutable_data_ptr());
    }
    left_ -= wanted;
    return std::exchange(next_, next_ + wanted);
  }
  Tensor like_;
  std::vector<Tensor> tensors_;
  char* next_ = nullptr;
  int64_t left_ = 0; // bytes from there
};

// The kernels count features in int.
inline KmeansInput kmeans_input(const char* op, const Problems& p, bool normalize) {
  constexpr int64_t most = std::numeric_limits<int>::max() / 2;
  OODK_CHECK_VALUE(
      p.d <= most, op, ": the number of features must be at most ", most, " on CUDA, got ", p.d);
  return {p.x.tensor.const_data_ptr(), p.x.dtype, p.batch, p.n, p.d, p.x.stride, normalize};
}

// The kernels count the candidates of a step of seeding, of all restarts, in int.
inline void check_candidates(const char* op, int64_t n_init, int64_t trials) {
  constexpr int64_t most = std::numeric_limits<int>::max();
  OODK_CHECK_VALUE(n_init <= most / trials, op, ": n_init times the candidates of a step must be ",
      "less than 2^31 on CUDA, got ", n_init, " x ", trials);
}

inline KmeansResults results(const KmeansOutput& out) {
  return {out.centroids.mutable_data_ptr(), out.labels.mutable_data_ptr<int64_t>(),
      out.inertia.mutable_data_ptr<double>(), out.n_iter.mutable_data_ptr<int64_t>()};
}

// K-means on a batch of problems, seeded or from rows (batch, restarts, k) or centroids (batch, k,
// d).
void cluster(const Launches& on, const KmeansInput& in, const KmeansOptions& options,
    const int64_t* rows, const void* centroids, const KmeansResults& out);

} // namespace oodk::cuda
