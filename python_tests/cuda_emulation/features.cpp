#include "cuda/features_kernel.cuh"

#include "runner.h"

using runner::Run;

namespace {

void feature_stats(Run& run) {
  const int64_t rows = run.integer("rows"), count = run.integer("count");
  const auto per_row = [&](const char* name, int64_t each) {
    return run.output(name, rows * each * run.out_size());
  };
  oodk::cuda::feature_stats(
      {run.input("features", run.integer("offset") * run.in_size()), run.dtype(), rows,
          run.integer("width"), run.integer("stride"), run.integer("rectified") != 0,
          run.input<double>("percentiles"), count, run.integer("step"), nullptr},
      per_row("l1", 1), per_row("l2", 1), per_row("sum", 1), per_row("threshold", count),
      per_row("top_sum", count));
}

} // namespace

int main(int argc, char** argv) {
  return runner::run(argc, argv, {{"feature_stats", feature_stats}});
}
