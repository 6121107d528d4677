// Scores that need nothing but logits, with z' = z / temperature:
//
//   m = max z    s = sum e^((z - m) / T)    w = sum (z - m) / T e^((z - m) / T)
//   msp = 1 / s    energy = m + T log s    entropy (negative) = w / s - log s
//
// A thread walks along a piece of a row in shared memory (rows.cuh), a unit at a time: the unit's
// maximum, one rescaling of s and w, one e^x for each logit; then the row's workers are merged.
// Memory: each logit read once, the outputs written once.
#pragma once

#include "cuda/common.cuh"
#include "cuda/rows.cuh"

namespace oodk::cuda {

struct LogitsInput {
  const void* logits; // (rows, width), `stride` values from row to row
  DType dtype;
  int64_t rows, width, stride;
  cudaStream_t stream;
};

template <typename T>
struct LogitScores {
  T *msp, *max_logit, *energy, *entropy;
  int64_t* label;
};

// What is known of a row after some of its columns. NaN counts as the largest, as in torch.max.
template <typename T>
struct LogitState {
  T scale; // log2 e / temperature
  T m = -kInf<T>, s = 0;
  T w = 0; // in units of log 2
  int at = std::numeric_limits<int>::max(); // m is in the unit that has this column

  template <int N>
  __device__ void add(const T (&x)[N], int column) {
    const T top = fold(x, larger_or_nan<T>);
    if (top > m || (top != top && m == m) || at > column)
      at = column;
    rescale(larger_or_nan(m, top));
    T e[N], d[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      d[i] = exponent(x[i] - shift(m));
      e[i] = exp2_fast(d[i]);
      d[i] *= e[i];
    }
    const auto plus = [](T a, T b) { return a + b; };
    s += fold(e, plus);
    w += fold(d, plus);
  }

  __device__ void merge(LogitState other) {
    const bool nan = m != m, other_nan = other.m != other.m;
    if (other.m > m || (other_nan && !nan) ||
        ((other.m == m || (other_nan && nan)) && other.at < at))
      at = other.at;
    const T most = larger_or_nan(m, other.m);
    rescale(most);
    other.rescale(most);
    s += other.s;
    w += other.w;
  }

 private:
  // (z - m) / T / log 2, bounded where 2^ of it is 0, so that 0 times it is 0.
  __device__ T exponent(T difference) const {
    return larger(difference * scale, T(-10000));
  }
  // Sums relative to m become sums relative to `most`, the new m.
  __device__ void rescale(T most) {
    const T d = exponent(m - shift(most)), f = exp2_fast(d);
    w = f * (w + d * s);
    s *= f;
    m = most;
  }
};

template <typename S, typename T = acc_t<S>>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<S>)
    logit_scores_kernel(Rows<S> z, Tiling tiling, T temperature, LogitScores<T> out) {
  constexpr int V = kPerUnit<S>;
  extern __shared__ uint4 shared[];
  auto* const slots = (LogitState<T>*)((char*)shared + tiling.tile_bytes());
  const LogitState<T> start{kLog2e<T> / temperature};
  LogitState<T> state = start;
  const auto add = [&](int64_t, bool exists, const Row<S>& row, int) {
    if (exists)
      for_units(row, tiling, shared, [&](T(&x)[V], int column, unsigned inside) {
        mask(x, inside, -kInf<T>);
        state.add(x, column);
      });
  };
  const auto write = [&](int64_t r, bool exists, const Row<S>& row, bool) {
    state = reduce_workers(state, tiling, slots);
    const LogitState<T> found = state;
    state = start;
    if (!exists || tiling.worker() != 0)
      return;
    int label = found.at;
    const T m = found.m;
#pragma unroll
    for (int e = V - 1; e >= 0; --e)
      if (found.at + e < z.width) {
        const T x = row[found.at + e];
        if (x == m || (x != x && m != m))
          label = found.at + e;
      }
    const bool finite = m - m == 0; // else the sums mean nothing
    const T s = finite ? found.s : kNaN<T>;
    const T w = finite ? found.w * kLn2<T> : kNaN<T>;
    out.msp[r] = divide(T(1), s);
    out.max_logit[r] = m;
    out.energy[r] = finite ? m + temperature * log_of(s) : m;
    out.entropy[r] = divide(w, s) - log_of(s);
    out.label[r] = label;
  };
  for_spans(z, tiling, shared, [](int) { return true; }, add, write);
}

// The outputs are (rows,), double for float64 logits, else float.
inline void logit_scores(const LogitsInput& in, double temperature, void* msp, void* max_logit,
    void* energy, void* entropy, int64_t* label) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    const Rows<S> z{(const S*)in.logits, in.rows, in.stride, int(in.width)};
    const Device device = Device::current();
    const Tiling t = tile(z);
    launch(logit_scores_kernel<S, T>, t.blocks(in.rows, device), kRowThreads,
        t.tile_bytes() + t.slot_bytes<LogitState<T>>(), in.stream, z, t, T(temperature),
        LogitScores<T>{(T*)msp, (T*)max_logit, (T*)energy, (T*)entropy, label});
  });
}

} // namespace oodk::cuda
