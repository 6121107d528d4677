// What the K-means and DOS bindings share: from tensors to what the launches take.
#pragma once

#include <vector>

#include "cuda/device.h"
#include "cuda/launches.cuh"
#include "ops/kmeans.h"

namespace oodk::cuda {

// torch's allocator: memory goes back to it in the order of the stream, and into a graph's pool.
class TensorScratch : public Scratch {
 public:
  explicit TensorScratch(const Tensor& like) : like_(like) {}
  void release() override {
    tensors_.clear();
  }

 private:
  void* bytes(size_t size) override {
    tensors_.push_back(empty({int64_t(size)}, ScalarType::Byte, like_));
    return tensors_.back().mutable_data_ptr();
  }
  Tensor like_;
  std::vector<Tensor> tensors_;
};

// The kernels count features in int.
inline KmeansInput kmeans_input(const char* op, const Problems& p, bool normalize) {
  constexpr int64_t most = std::numeric_limits<int>::max() / 2;
  OODK_CHECK_VALUE(p.d <= most, op, ": the number of features must be at most ", most,
      " on CUDA, got ", p.d);
  return {p.x.tensor.const_data_ptr(), p.x.dtype, p.batch, p.n, p.d, p.x.stride, normalize};
}

inline KmeansResults results(const KmeansOutput& out) {
  return {out.centroids.mutable_data_ptr(), out.labels.mutable_data_ptr<int64_t>(),
      out.inertia.mutable_data_ptr<double>(), out.n_iter.mutable_data_ptr<int64_t>()};
}

// K-means on a batch of problems, seeded or from rows (batch, restarts, k) or centroids (batch, k, d).
void cluster(const Launches& on, const KmeansInput& in, const KmeansOptions& options,
    const int64_t* rows, const void* centroids, const KmeansResults& out);

} // namespace oodk::cuda
