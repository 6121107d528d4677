#include "cuda/kmeans/driver.cuh"

#include "scratch.h"

using runner::Run;

namespace oodk::cuda {
namespace {

struct Call {
  explicit Call(Run& run)
      : on{{nullptr, scratch, Device::current(), int(run.integer("threads"))},
            int(run.integer("small")), int(run.integer("gram")), int(run.integer("seeding_limit")),
            int(run.integer("sample")), run.integer("memory")},
        in{run.input("x", run.integer("offset") * run.in_size()), run.dtype(), run.integer("batch"),
            run.integer("n"), run.integer("d"), run.integer("stride"),
            run.integer("normalize") != 0} {}

  runner::GuardedScratch scratch;
  KmeansLaunches on;
  KmeansInput in;
};

void init(Run& run) {
  const Call call(run);
  KmeansOptions options{int(run.integer("k")), int(run.integer("restarts"))};
  options.trials = int(run.integer("trials"));
  options.seed = uint64_t(run.integer("seed"));
  kmeans_init(
      call.on, call.in, options, run.indices("rows", call.in.batch * options.restarts * options.k));
}

void fit(Run& run) {
  const Call call(run);
  const KmeansOptions options{int(run.integer("k")), int(run.integer("restarts")),
      int(run.integer("trials")), int(run.integer("max_iter")), run.real("tol"),
      run.integer("renormalize") != 0, uint64_t(run.integer("seed"))};
  const int64_t batch = call.in.batch;
  const KmeansResults out{run.output("centroids", batch * options.k * call.in.d * run.out_size()),
      run.indices("labels", batch * call.in.n),
      run.output<double>("inertia", batch * sizeof(double)),
      run.output<int64_t>("n_iter", batch * sizeof(int64_t))};
  const int64_t start = run.integer("start"); // 0: as seeded, 1: from rows, 2: from centroids
  kmeans(call.on, call.in, options, start == 1 ? run.input<int64_t>("init") : nullptr,
      start == 2 ? run.input("init") : nullptr, out);
}

void nearest(Run& run) {
  const Call call(run);
  const int64_t points = call.in.batch * call.in.n;
  nearest_centroid(call.on, call.in, run.input("centroids"), int(run.integer("k")),
      run.indices("labels", points), run.output("distance", points * run.out_size()));
}

void stratum(Run& run) {
  *run.output<int64_t>("at", sizeof(int64_t)) =
      stratified(run.integer("n"), run.integer("count"), run.integer("j"), ~uint64_t(0));
}

} // namespace
} // namespace oodk::cuda

int main(int argc, char** argv) {
  using namespace oodk::cuda;
  return runner::run(argc, argv,
      {{"kmeans_init", init}, {"kmeans_fit", fit}, {"kmeans_nearest", nearest},
          {"kmeans_stratum", stratum}});
}
