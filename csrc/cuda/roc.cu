// CUDA backend of the ROC ops. Nothing waits for the GPU.
#include "ops/roc.h"

#include <cub/device/device_radix_sort.cuh>

#include <tuple>

#include "cuda/common.cuh"
#include "cuda/device.h"
#include "cuda/roc_kernel.cuh"

namespace oodk::cuda {
namespace {

int64_t blocks_for(int64_t threads) {
  return (threads + kRocThreads - 1) / kRocThreads;
}

template <typename Key>
Tensor sorted_keys(const RocScores& scores) {
  const OnDevice here(scores.tensor);
  const cudaStream_t stream = here.stream;
  const int64_t n = scores.count;
  const Tensor keys = empty({n}, scores.key_type, scores.tensor);
  const Tensor other = empty({n}, scores.key_type, scores.tensor);
  const int64_t blocks = std::min<int64_t>(blocks_for(n), 1 << 20);
  launch(make_keys<Key>, blocks, kRocThreads, 0, stream, (const Key*)scores.tensor.const_data_ptr(),
      n, scores.stride, scores.inf_bits, (Key*)keys.mutable_data_ptr());

  cub::DoubleBuffer<Key> buffers((Key*)keys.mutable_data_ptr(), (Key*)other.mutable_data_ptr());
  size_t bytes = 0;
  constexpr int bits = 8 * sizeof(Key);
  check(cub::DeviceRadixSort::SortKeys(nullptr, bytes, buffers, n, 0, bits, stream), "SortKeys");
  const Tensor scratch = empty({int64_t(bytes)}, ScalarType::Byte, scores.tensor);
  check(cub::DeviceRadixSort::SortKeys(
            scratch.mutable_data_ptr(), bytes, buffers, n, 0, bits, stream),
      "SortKeys");

  return buffers.Current() == keys.const_data_ptr() ? keys : other;
}

Tensor roc_keys(const Tensor& t) {
  const RocScores scores = roc_scores(t);
  switch (scores.width) {
    case 2: return sorted_keys<int16_t>(scores);
    case 4: return sorted_keys<int32_t>(scores);
    default: return sorted_keys<int64_t>(scores);
  }
}

template <typename Key>
std::tuple<Tensor, Tensor> counts_of(const RocKeys& keys) {
  constexpr int64_t size = 64; // scores of a thread
  const int64_t blocks = blocks_for((keys.n + keys.m + size - 1) / size);
  const OnDevice here(keys.id);
  const Tensor scratch = empty({blocks * int64_t(sizeof(RocSums))}, ScalarType::Byte, keys.id);
  const Tensor counts = keys.new_counts(), areas = keys.new_areas();
  RocSums* partial = (RocSums*)scratch.mutable_data_ptr();
  launch(sum_chunks<Key>, blocks, kRocThreads, kRocShared, here.stream,
      (const Key*)keys.id.const_data_ptr(), keys.n, (const Key*)keys.ood.const_data_ptr(), keys.m,
      size, partial);
  launch(sum_blocks, 1, kRocThreads, kRocShared, here.stream, partial, blocks, keys.n, keys.m,
      counts.mutable_data_ptr<int64_t>(), areas.mutable_data_ptr<double>());
  return {counts, areas};
}

std::tuple<Tensor, Tensor> roc_counts(const Tensor& id_keys, const Tensor& ood_keys) {
  const RocKeys keys = oodk::roc_keys(id_keys, ood_keys);
  switch (keys.width) {
    case 2: return counts_of<int16_t>(keys);
    case 4: return counts_of<int32_t>(keys);
    default: return counts_of<int64_t>(keys);
  }
}

} // namespace
} // namespace oodk::cuda

STABLE_TORCH_LIBRARY_IMPL(oodk, CUDA, m) {
  m.impl("_roc_keys", TORCH_BOX(&oodk::cuda::roc_keys));
  m.impl("_roc_counts", TORCH_BOX(&oodk::cuda::roc_counts));
}
