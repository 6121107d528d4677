#include "cuda/roc_kernel.cuh"

#include "runner.h"

using runner::Run;

namespace oodk::cuda {
namespace {

// Calls f(Key{}) with the integer that is as wide as a score.
template <typename F>
void with_key(const Run& run, F f) {
  switch (run.in_size()) {
    case 2: return f(int16_t{});
    case 4: return f(int32_t{});
    default: return f(int64_t{});
  }
}

void keys(Run& run) {
  with_key(run, [&](auto zero) {
    using Key = decltype(zero);
    const int64_t n = run.integer("n");
    launch(make_keys<Key>, run.integer("blocks"), kRocThreads, 0, nullptr,
        run.input<Key>("scores", run.integer("offset") * sizeof(Key)), n, run.integer("stride"),
        run.integer("inf_bits"), run.output<Key>("keys", n * sizeof(Key)));
  });
}

void counts(Run& run) {
  const int64_t n = run.integer("n"), m = run.integer("m"), size = run.integer("size");
  const int64_t blocks = (n + m + size * kRocThreads - 1) / (size * kRocThreads);
  RocSums* const partial = run.output<RocSums>("partial", blocks * sizeof(RocSums));
  with_key(run, [&](auto zero) {
    using Key = decltype(zero);
    launch(sum_chunks<Key>, blocks, kRocThreads, kRocShared, nullptr, run.input<Key>("id"), n,
        run.input<Key>("ood"), m, size, partial);
  });
  launch(sum_blocks, 1, kRocThreads, kRocShared, nullptr, partial, blocks, n, m,
      run.output<int64_t>("counts", kRocCounts * 2 * sizeof(int64_t)),
      run.output<double>("areas", kRocAreas * sizeof(double)));
}

} // namespace
} // namespace oodk::cuda

int main(int argc, char** argv) {
  return runner::run(
      argc, argv, {{"roc_keys", oodk::cuda::keys}, {"roc_counts", oodk::cuda::counts}});
}
