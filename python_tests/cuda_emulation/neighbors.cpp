#include "cuda/neighbors_kernel.cuh"

#include "scratch.h"

using runner::Run;

namespace oodk::cuda {
namespace {

void search(Run& run) {
  runner::GuardedScratch scratch;
  const Launches on{nullptr, scratch};
  NeighborInput in{run.input("queries"), run.input("bank"), run.dtype(),
      DType(run.integer("bank_type")), run.integer("count"), run.integer("n"),
      run.integer("query_stride"), run.integer("bank_stride"), int(run.integer("d")),
      int(run.integer("k")), run.integer("normalize") != 0};
  in.chunk = int(run.integer("chunk"));
  in.piece = int(run.integer("piece"));
  double* const scale = scratch.array<double>(in.n); // of either type
  bank_scales(on, in, scale);
  nearest_neighbors(on, in, scale, run.output("distances", in.count * in.k * run.out_size()),
      run.indices("indices", size_t(in.count * in.k)));
}

} // namespace
} // namespace oodk::cuda

int main(int argc, char** argv) {
  return runner::run(argc, argv, {{"neighbors_search", oodk::cuda::search}});
}
