// GEN, as cpu/gen_kernel.cpp has it, a block a row; sums in float64.
#pragma once

#include <algorithm>

#include "cuda/ranking.cuh"

namespace oodk::cuda {

constexpr int kGenSettings = 32; // of a launch

struct GenInput {
  const void* logits; // (rows, width), `stride` values from row to row
  DType dtype;
  int64_t rows, width, stride;
  cudaStream_t stream;
};

struct GenSettings {
  double gamma[kGenSettings];
  int m[kGenSettings];
  int first, count, all; // of the columns of the scores
};

template <typename S, typename T = acc_t<S>>
__global__ void __launch_bounds__(kRankingThreads, 4)
    gen_scores_kernel(GenInput in, bool staged, GenSettings settings, T* scores) {
  extern __shared__ uint4 shared[];
  for (int64_t r = blockIdx.x; r < in.rows; r += gridDim.x) {
    const RankedRow<S> row{
        (const S*)in.logits + r * in.stride, staged ? (T*)shared : nullptr, int(in.width), false};
    row.stage();
    const bool nan = row.holds_nan();
    const T top = nan ? kNaN<T> : kth_largest(row, 1).value;
    const T second = nan || in.width < 2 ? -kInf<T> : kth_largest(row, 2).value;
    const T shift = second == -kInf<T> ? T(0) : second;
    const double others = row.sum([=](double z) { // one of those that equal `top` counts 0
      return T(z) == top ? (top == second ? 1.0 : 0.0) : double(exp_fast(T(z) - shift));
    });
    const T log_others =
        second == -kInf<T> ? second : shift - top + log_of(T(others - (top == second)));
    const T log_all = log_of(1 + exp_fast(log_others));
    const T log_largest = log_others - 2 * log_all;
    const auto log_of_both = [=](T z) {
      const T log_p = z - top - log_all;
      return z == top ? log_largest : log_p + log_of(1 - exp_fast(log_p));
    };
#pragma unroll 1
    for (int i = 0; i < settings.count; ++i) {
      T score = kNaN<T>;
      if (!nan && top - top == 0) { // the same for all threads
        const T gamma = T(settings.gamma[i]);
        const Ranked<T> least = kth_largest(row, settings.m[i]);
        const auto term = [=](T z) { return double(exp_fast(gamma * log_of_both(z))); };
        const double above =
            row.sum([=](double z) { return T(z) > least.value ? term(T(z)) : 0.0; });
        score = T(-(above + double(least.equal) * term(least.value)));
      }
      if (threadIdx.x == 0)
        scores[r * settings.all + settings.first + i] = score;
    }
  }
}

inline void gen_scores(
    const GenInput& in, const double* gamma, const int64_t* m, int64_t count, void* scores) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    const RankingLaunch with = ranking_launch<S>(in.rows, in.width);
    for (int64_t first = 0; first < count; first += kGenSettings) {
      GenSettings settings{};
      settings.first = int(first);
      settings.all = int(count);
      settings.count = int(std::min<int64_t>(count - first, kGenSettings));
      for (int i = 0; i < settings.count; ++i) {
        settings.gamma[i] = gamma[first + i];
        settings.m[i] = int(m[first + i]);
      }
      launch(gen_scores_kernel<S, T>, with.blocks, kRankingThreads, with.shared, in.stream, in,
          with.shared > 0, settings, (T*)scores);
    }
  });
}

} // namespace oodk::cuda
