#include "cuda/histogram_kernel.cuh"

#include "runner.h"

using runner::Run;

namespace oodk::cuda {
namespace {

void histogram(Run& run) {
  const int64_t n_rows = run.integer("n_rows"), width = run.integer("width");
  const int64_t n_atoms = run.integer("n_atoms");
  const size_t bytes = n_rows * width * sizeof(int64_t);
  auto* const counts = run.output<unsigned long long>("counts", bytes);
  std::memcpy(counts, run.input("before"), bytes);
  const HistogramTable table{run.input<uint64_t>("table"),
      n_atoms ? run.input<int32_t>("atoms") : nullptr, width - n_atoms - kFacts, n_atoms};
  dispatch(run.dtype(), [&](auto zero) {
    using S = decltype(zero);
    const HistogramLaunch<S> in{run.input<S>("scores", run.integer("offset") * sizeof(S)),
        run.integer("has_rows") ? run.input<uint8_t>("rows") : nullptr, run.integer("n"),
        run.integer("side"), n_rows, table, counts, width};
    launch(count_scores<S>, run.integer("blocks"), kHistogramThreads, 0, nullptr, in);
  });
}

} // namespace
} // namespace oodk::cuda

int main(int argc, char** argv) {
  return runner::run(argc, argv, {{"histogram", oodk::cuda::histogram}});
}
