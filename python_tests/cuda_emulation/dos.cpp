#include "cuda/dos_kernel.cuh"

#include "scratch.h"

using runner::Run;

namespace oodk::cuda {
namespace {

struct Call {
  explicit Call(Run& run)
      : on{nullptr, scratch, Device::current(), int(run.integer("threads"))},
        in{run.input<int64_t>("labels"), run.input("scores"), run.dtype(), run.integer("batch"),
            run.integer("n"), run.integer("stride")} {}

  runner::GuardedScratch scratch;
  Launches on;
  SelectionInput in;
};

void argmax(Run& run) {
  const Call call(run);
  const int64_t k = run.integer("k"), m = run.integer("m");
  cluster_argmax(call.on, call.in, int(k), int(m), run.indices("best", call.in.problems * k * m));
}

void choose(Run& run) {
  const Call call(run);
  const int64_t n_select = run.integer("n_select");
  select(call.on, call.in,
      {int(run.integer("k")), int(run.integer("m")), int(n_select), int(run.integer("visited")),
          run.integer("best_clusters") != 0, uint64_t(run.integer("seed"))},
      run.indices("selected", call.in.problems * n_select));
}

} // namespace
} // namespace oodk::cuda

int main(int argc, char** argv) {
  using namespace oodk::cuda;
  return runner::run(argc, argv, {{"dos_argmax", argmax}, {"dos_select", choose}});
}
