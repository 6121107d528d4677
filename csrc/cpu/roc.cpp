// CPU backend of the ROC ops.
#include "ops/roc.h"

#include <algorithm>
#include <array>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/roc_kernel.h"

namespace oodk {
namespace {

// f(part) for parts of [0, count), one a thread: part p is [p count / parts, (p + 1) count / parts).
template <typename F>
void for_parts(int64_t parts, const F& f) {
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      f(p);
  });
}

Tensor roc_keys_cpu(const Tensor& t) {
  const RocScores scores = roc_scores(t);
  const RocKernels& kernels = OODK_SELECT_KERNELS(roc_kernels);
  const int64_t n = scores.count;
  const int width = scores.width, digits = radix_digits(width);
  constexpr int64_t least = 1 << 15; // scores that are worth a thread
  const int64_t parts = std::clamp<int64_t>(n / least, 1, torch::stable::get_num_threads());
  const auto begin = [&](int64_t part) { return part * n / parts; };
  const auto new_keys = [&] {
    const Tensor buffer = empty({n}, scores.key_type, t);
    advise_huge_pages(buffer.mutable_data_ptr(), n * width);
    return buffer;
  };

  Tensor keys = new_keys();
  std::vector<int64_t> counts(parts * digits * kRadix); // (parts, digits, kRadix)
  for_parts(parts, [&](int64_t p) {
    kernels.make_keys(scores.tensor.const_data_ptr(), scores.stride, width, scores.inf_bits,
        begin(p), begin(p + 1), keys.mutable_data_ptr(), &counts[p * digits * kRadix]);
  });

  Tensor sorted; // by the digits so far
  bool moved = false;
  for (int digit = 0; digit < digits; ++digit) {
    const auto count_of = [&](int64_t p) { return &counts[(p * digits + digit) * kRadix]; };
    std::array<int64_t, kRadix> total{};
    for (int64_t p = 0; p < parts; ++p)
      std::transform(total.begin(), total.end(), count_of(p), total.begin(), std::plus<>());
    if (*std::max_element(total.begin(), total.end()) == n)
      continue; // all keys have the same
    if (moved && parts > 1) // a part no longer holds the keys that were counted in it
      for_parts(parts, [&](int64_t p) {
        std::fill_n(count_of(p), kRadix, 0);
        kernels.count(keys.const_data_ptr(), width, digit, begin(p), begin(p + 1), count_of(p));
      });
    int64_t place = 0; // counts become the places of their keys
    for (int d = 0; d < kRadix; ++d)
      for (int64_t p = 0; p < parts; ++p)
        place += std::exchange(count_of(p)[d], place);
    if (!moved)
      sorted = new_keys();
    for_parts(parts, [&](int64_t p) {
      kernels.scatter(keys.const_data_ptr(), width, digit, begin(p), begin(p + 1), count_of(p),
          sorted.mutable_data_ptr());
    });
    std::swap(keys, sorted);
    moved = true;
  }
  return keys;
}

template <typename K>
void sum_chunks(const RocKeys& keys, std::vector<RocSums>& partial) {
  const K* id = (const K*)keys.id.const_data_ptr();
  const K* ood = (const K*)keys.ood.const_data_ptr();
  const RocKernels& kernels = OODK_SELECT_KERNELS(roc_kernels);
  parallel_for(0, int64_t(partial.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const RocChunk chunk = chunk_at(id, keys.n, ood, keys.m, c, kRocChunk);
      kernels.sums(id, keys.n, ood, keys.m, keys.width, chunk.begin, chunk.end, &partial[c]);
      add_level(partial[c], chunk.end, chunk.after, keys.n, keys.m);
    }
  });
}

// Chunks are fixed and added in order: the same bits on any number of threads.
std::tuple<Tensor, Tensor> roc_counts(const Tensor& id_keys, const Tensor& ood_keys) {
  const RocKeys keys = roc_keys(id_keys, ood_keys);
  std::vector<RocSums> partial((keys.n + keys.m + kRocChunk - 1) / kRocChunk);
  switch (keys.width) {
    case 2: sum_chunks<int16_t>(keys, partial); break;
    case 4: sum_chunks<int32_t>(keys, partial); break;
    default: sum_chunks<int64_t>(keys, partial);
  }
  RocTotal total{};
  for (const RocSums& chunk : partial)
    total.add(chunk);
  const Tensor counts = keys.new_counts(), out = keys.new_areas();
  write_sums(total.value(), keys.n, keys.m, counts.mutable_data_ptr<int64_t>(),
      out.mutable_data_ptr<double>());
  return {counts, out};
}

} // namespace
} // namespace oodk

STABLE_TORCH_LIBRARY_IMPL(oodk, CPU, m) {
  m.impl("_roc_keys", TORCH_BOX(&oodk::roc_keys_cpu));
  m.impl("_roc_counts", TORCH_BOX(&oodk::roc_counts));
}
