#include "cuda/distances_kernel.cuh"
#include "cuda/energy_kernel.cuh"
#include "cuda/features_kernel.cuh"
#include "cuda/gen_kernel.cuh"
#include "cuda/shape_kernel.cuh"

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

void indexed_distances(Run& run) {
  const int64_t rows = run.integer("rows"), count = run.integer("count");
  const auto each = [&](const char* name) {
    return run.output(name, rows * count * run.out_size());
  };
  oodk::cuda::indexed_distances(
      {run.input("x", run.integer("offset") * run.in_size()), run.dtype(), rows,
          run.integer("width"), run.integer("stride"), run.input("table"),
          run.integer("table_rows"), run.integer("width"), run.input<int64_t>("index"), count,
          nullptr},
      each("inner"), each("l1"), each("l2"));
}

void scaled_energy(Run& run) {
  const int64_t rows = run.integer("rows"), count = run.integer("count");
  oodk::cuda::scaled_energy(
      {run.input("logits", run.integer("offset") * run.in_size()), run.dtype(), rows,
          run.integer("width"), run.integer("stride"), run.input("scale"), count,
          run.integer("biased") ? run.input("bias") : nullptr, nullptr},
      run.output("energy", rows * count * run.out_size()));
}

void gen_scores(Run& run) {
  const int64_t rows = run.integer("rows"), count = run.integer("count");
  oodk::cuda::gen_scores({run.input("logits", run.integer("offset") * run.in_size()), run.dtype(),
                             rows, run.integer("width"), run.integer("stride"), nullptr},
      run.input<double>("gamma"), run.input<int64_t>("m"), count,
      run.output("scores", rows * count * run.out_size()));
}

void shape_features(Run& run) {
  const int64_t rows = run.integer("rows"), width = run.integer("width");
  const size_t bytes = size_t(rows * width) * run.in_size();
  void* out = run.output("shaped", bytes);
  std::memcpy(out, run.input("features"), bytes);
  const bool low = run.integer("low") != 0, high = run.integer("high") != 0;
  oodk::cuda::shape_features(
      {out, run.dtype(), rows, width, width, oodk::Shape(run.integer("shape")), run.integer("k"),
          low ? run.input("low") : nullptr, high ? run.input("high") : nullptr, 0, 1, nullptr});
}

} // namespace

int main(int argc, char** argv) {
  return runner::run(argc, argv,
      {{"feature_stats", feature_stats}, {"gen_scores", gen_scores},
          {"indexed_distances", indexed_distances}, {"scaled_energy", scaled_energy},
          {"shape_features", shape_features}});
}
