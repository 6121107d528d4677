// Small kernels, most of them wrong, that show what the emulation finds.
#include "cuda/common.cuh"

#include "runner.h"

using runner::Run;

namespace oodk::cuda {

constexpr int kThreads = 64;

__global__ void out_of_bounds(int* out) {
  out[threadIdx.x + 1] = 1;
}

__global__ void out_of_bounds_shared(int* out) {
  extern __shared__ uint4 shared[];
  ((int*)shared)[threadIdx.x + 4] = 1;
  out[threadIdx.x] = 1;
}

__global__ void missing_barrier(int* out) {
  extern __shared__ uint4 shared[];
  ((int*)shared)[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = ((int*)shared)[threadIdx.x / 2];
}

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncwarp();
  out[threadIdx.x] = 1;
}

__global__ void missing_wait(int* out) {
  extern __shared__ uint4 shared[];
  alignas(16) static const int source[4] = {1, 2, 3, 4};
  __pipeline_memcpy_async(shared + threadIdx.x, source, sizeof(uint4));
  __pipeline_commit();
  out[threadIdx.x] = ((int*)shared)[4 * threadIdx.x];
}

__global__ void unwritten_output(int* out) {
  if (threadIdx.x + 1 < blockDim.x)
    out[threadIdx.x] = 1;
}

__global__ void shuffles(int* out) {
  int x = int(threadIdx.x % kWarp);
  x = __shfl_up_sync(kAllLanes, x, 3);
  x = __shfl_down_sync(kAllLanes, x, 1);
  out[threadIdx.x] = __shfl_xor_sync(kAllLanes, x, 4);
}

__global__ void votes(int* out) {
  const bool even = threadIdx.x % 2 == 0;
  const unsigned ballot = __ballot_sync(kAllLanes, even);
  const bool right = __any_sync(kAllLanes, even) && !__all_sync(kAllLanes, even) &&
      __syncthreads_or(even) && !__syncthreads_and(even) && __syncthreads_count(even) == 32;
  out[threadIdx.x] = right ? int(ballot) : 0;
}

__global__ void matches(int* out) {
  const unsigned long long high = 1ull << 40; // tells values apart beyond 32 bits
  out[threadIdx.x] = int(__match_any_sync(kAllLanes, threadIdx.x % 2 * high));
}

__global__ void reductions(int* out) {
  const int x = int(threadIdx.x % kWarp) - 16;
  out[threadIdx.x] = __reduce_min_sync(kAllLanes, x) + __reduce_max_sync(kAllLanes, x) +
      __reduce_add_sync(kAllLanes, x);
}

__global__ void atomics(int* out) {
  extern __shared__ uint4 shared[];
  int* const count = (int*)shared;
  if (threadIdx.x == 0)
    *count = 0;
  __syncthreads();
  atomicAdd(count, 1);
  __syncthreads();
  out[threadIdx.x] = *count;
}

__global__ void static_shared(int* out) {
  __shared__ int turned[kThreads];
  turned[kThreads - 1 - threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = turned[threadIdx.x];
}

__global__ void unwritten_shared(int* out) { // by the block before it, maybe
  __shared__ int words[kThreads];
  if (blockIdx.x == 0 && threadIdx.x % 2 == 0)
    words[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = words[threadIdx.x];
}

// Each block adds its own to a number that it has read before a barrier: other blocks', too, have.
__global__ void lost_updates(int* out) {
  const int before = out[0];
  __syncthreads();
  if (threadIdx.x == 0)
    out[0] = before + 1;
}

// The last block to come adds up what all have written. counts[0]: how many have come.
template <bool Fence>
__global__ void hand_over(int* written, int* counts, int* out) {
  __shared__ bool last;
  written[blockIdx.x * kThreads + threadIdx.x] = 1;
  if (Fence)
    __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    last = atomicAdd(counts, 1) == int(gridDim.x) - 1;
  __syncthreads();
  if (!last || threadIdx.x > 0)
    return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x * kThreads; ++i)
    sum += written[i];
  *out = sum;
}

// The rows of a tensor of many GiB, counted in 32 bits.
__global__ void int_offsets(const float* rows, int stride, int* out) {
  out[threadIdx.x] = int(rows[unsigned(stride) * 2 + threadIdx.x]);
}

__global__ void nan_rules(int* out) {
  const float nan = kNaN<float>;
  const double wide = kNaN<double>;
  const bool right = max(nan, 1.f) == 1 && max(1.f, nan) == 1 && min(nan, 1.f) == 1 &&
      min(1.f, nan) == 1 && max(wide, 1.) == 1 && min(1., wide) == 1 && larger(nan, 2.f) == 2 &&
      larger_or_nan(nan, 2.f) != 2 && max(3, 4) == 4;
  out[threadIdx.x] = right;
}

__global__ void approximations(int* out) {
  const float x = -0.37f * float(threadIdx.x + 1);
  const double exact = exp2(double(x)), error = fabs(exp2_fast(x) / exact - 1);
  const float huge = 0x1p127f, tiny = -128;
  out[threadIdx.x] = error < 0x1p-21 && exp2_fast(0.f) == 1 && exp2_fast(tiny) == 0 &&
      divide(1.f, huge) == 0 && divide(kInf<float>, huge) != 0;
}

__global__ void exact_powers(int* out) { // as they are not
  const float x = -0.37f * float(threadIdx.x + 1);
  out[threadIdx.x] = exp2_fast(x) == float(exp2(double(x)));
}

template <bool Fence>
void hand_overs(Run& run) {
  constexpr int blocks = 6;
  int* const counts = run.output<int>("counts", sizeof(int), 0);
  launch(hand_over<Fence>, blocks, kThreads, 0, nullptr,
      run.output<int>("written", blocks * kThreads * sizeof(int)), counts,
      run.output<int>("out", sizeof(int)));
}

void updates(Run& run) {
  launch(lost_updates, 5, kThreads, 0, nullptr, run.output<int>("out", sizeof(int), 0));
}

void far_rows(Run& run) {
  const auto* const rows = static_cast<const float*>(run.logits());
  launch(int_offsets, 1, kThreads, 0, nullptr, rows, int(run.integer("stride")),
      run.output<int>("out", kThreads * sizeof(int)));
}

void two_blocks(Run& run) {
  launch(unwritten_shared, 2, kThreads, 0, nullptr,
      run.output<int>("out", 2 * kThreads * sizeof(int)));
}

template <void (*kernel)(int*)>
void one_block(Run& run) {
  const size_t shared = kernel == missing_wait ? kThreads * sizeof(uint4) : kThreads * sizeof(int);
  launch(kernel, 1, kThreads, shared, nullptr, run.output<int>("out", kThreads * sizeof(int)));
}

} // namespace oodk::cuda

int main(int argc, char** argv) {
  using namespace oodk::cuda;
  return runner::run(argc, argv,
      {{"out_of_bounds", one_block<out_of_bounds>},
          {"out_of_bounds_shared", one_block<out_of_bounds_shared>},
          {"missing_barrier", one_block<missing_barrier>},
          {"divergent_barrier", one_block<divergent_barrier>},
          {"missing_wait", one_block<missing_wait>},
          {"unwritten_output", one_block<unwritten_output>}, {"shuffles", one_block<shuffles>},
          {"votes", one_block<votes>}, {"matches", one_block<matches>},
          {"reductions", one_block<reductions>}, {"atomics", one_block<atomics>},
          {"static", one_block<static_shared>}, {"unwritten_shared", two_blocks},
          {"lost_updates", updates}, {"unfenced", hand_overs<false>}, {"fenced", hand_overs<true>},
          {"int_offsets", far_rows}, {"nan_rules", one_block<nan_rules>},
          {"approximations", one_block<approximations>},
          {"exact_powers", one_block<exact_powers>}});
}
