#include "cuda/outlier_kernel.cuh"

#include "runner.h"

using oodk::cuda::OutlierInput;
using runner::Run;

namespace {

OutlierInput input(Run& run) {
  return {run.logits(), run.dtype(), run.integer("rows"), run.integer("width"),
      run.integer("stride"), run.input<int64_t>("target"), nullptr};
}

void forward(Run& run) {
  const int64_t bytes = run.integer("rows") * run.out_size();
  oodk::cuda::outlier_cross_entropy(input(run), run.output("loss", bytes),
      run.output("logsumexp", bytes), run.output("stats", 2 * bytes));
}

void backward(Run& run) {
  oodk::cuda::outlier_cross_entropy_backward(input(run), run.input("grad_loss"),
      run.input("grad_logsumexp"), run.input("stats"),
      run.output("grad_logits", run.integer("rows") * run.integer("width") * run.in_size()));
}

} // namespace

int main(int argc, char** argv) {
  return runner::run(argc, argv,
      {{"outlier_cross_entropy", forward}, {"outlier_cross_entropy_backward", backward}});
}
