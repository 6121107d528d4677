// CPU backend of the ROC ops.
#include "ops/roc.h"

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "cpu/memory.h"
#include "cpu/roc_kernel.h"

namespace oodk {
namespace {

// f(part) for parts of [0, count), one a thread: part p is [p count / parts, (p + 1) count / parts).
template <typename F>
void for_parts(int64_t parts, const F& f) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      f(p);
  });
}

Tensor roc_keys_cpu(const Tensor& t, const std::string& op, const std::string& argument) {
  const RocScores scores = roc_scores(op, argument, t);
  const RocKernels& kernels = OODK_SELECT_KERNELS(roc_kernels);
  const int64_t n = scores.count;
  const int digits = radix_digits(scores.width);
  constexpr int64_t least = 1 << 15; // scores that are worth a thread
  const int64_t parts = std::clamp<int64_t>(n / least, 1, torch::stable::get_num_threads());
  const auto begin = [&](int64_t part) { return part * n / parts; };

  RadixSource source{scores.tensor.const_data_ptr(), scores.stride, scores.width, false};
  std::vector<int64_t> counts(parts * digits * kRadix); // (parts, digits, kRadix)
  std::vector<NanCount> nans(parts);
  for_parts(parts, [&](int64_t p) {
    kernels.count_all(source, begin(p), begin(p + 1), scores.inf_bits,
        &counts[p * digits * kRadix], &nans[p]);
  });
  NanCount nan{};
  for (const NanCount& found : nans) {
    nan.first = nan.count ? nan.first : found.first;
    nan.count += found.count;
  }
  if (nan.count)
    throw_nan(op, argument, nan.count, nan.first);

  std::vector<int> passes; // the digits in which keys differ
  for (int digit = 0; digit < digits; ++digit) {
    std::array<int64_t, kRadix> total{};
    for (int64_t p = 0; p < parts; ++p)
      for (int d = 0; d < kRadix; ++d)
        total[d] += counts[(p * digits + digit) * kRadix + d];
    if (*std::max_element(total.begin(), total.end()) < n)
      passes.push_back(digit);
  }

  Tensor keys = empty({n}, scores.key_type, t);
  const auto advised = [&](const Tensor& buffer) {
    advise_huge_pages(buffer.mutable_data_ptr(), n * scores.width);
    return buffer;
  };
  advised(keys);
  if (passes.empty()) {
    for_parts(parts, [&](int64_t p) {
      kernels.copy(source, begin(p), begin(p + 1), keys.mutable_data_ptr());
    });
    return keys;
  }
  const Tensor other =
      passes.size() > 1 ? advised(empty({n}, scores.key_type, t)) : keys;
  bool to_keys = passes.size() % 2 == 1; // so that the last pass ends there
  for (size_t pass = 0; pass < passes.size(); ++pass, to_keys = !to_keys) {
    const int digit = passes[pass];
    const bool counted = pass == 0 || parts == 1; // a part's scores are still those counted
    std::vector<int64_t> places(parts * kRadix);
    for_parts(parts, [&](int64_t p) {
      if (counted)
        std::copy_n(&counts[(p * digits + digit) * kRadix], kRadix, &places[p * kRadix]);
      else
        kernels.count(source, begin(p), begin(p + 1), digit, &places[p * kRadix]);
    });
    int64_t place = 0;
    for (int d = 0; d < kRadix; ++d)
      for (int64_t p = 0; p < parts; ++p)
        place += std::exchange(places[p * kRadix + d], place);
    void* out = (to_keys ? keys : other).mutable_data_ptr();
    for_parts(parts, [&](int64_t p) {
      kernels.scatter(source, begin(p), begin(p + 1), digit, &places[p * kRadix], out);
    });
    source = {out, 1, scores.width, true};
  }
  return keys;
}

template <typename K>
void sum_chunks(const RocKeys& keys, std::vector<RocSums>& partial) {
  const K* id = (const K*)keys.id.const_data_ptr();
  const K* ood = (const K*)keys.ood.const_data_ptr();
  const RocKernels& kernels = OODK_SELECT_KERNELS(roc_kernels);
  torch::stable::parallel_for(0, int64_t(partial.size()), 4, [&](int64_t begin, int64_t end) {
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
