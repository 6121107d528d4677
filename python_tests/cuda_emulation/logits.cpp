#include "cuda/logits_kernel.cuh"

#include "runner.h"

using runner::Run;

namespace {

void logit_scores(Run& run) {
  const int64_t rows = run.integer("rows");
  const auto per_row = [&](const char* name) { return run.output(name, rows * run.out_size()); };
  oodk::cuda::logit_scores(
      {run.logits(), run.dtype(), rows, run.integer("width"), run.integer("stride"), nullptr},
      run.real("temperature"), per_row("msp"), per_row("max_logit"), per_row("energy"),
      per_row("entropy"), run.output<int64_t>("label", rows * sizeof(int64_t)));
}

} // namespace

int main(int argc, char** argv) {
  return runner::run(argc, argv, {{"logit_scores", logit_scores}});
}
