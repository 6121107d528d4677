// Cross entropy of rows with a target class t, uniform cross entropy of those without, for OOD:
//
//   m = max z    s = sum e^(z - m)    w = sum (z - z_0)
//   logsumexp = m + log s    loss = log s + m - z_t,    for OOD log s + m - z_0 - w / C
//
// Forward. A thread walks along a piece of a row in shared memory (rows.cuh), a unit at a time: the
// unit's maximum, one rescaling of s, one e^x for each logit; then the row's workers are merged. w
// is relative to the row's first logit, so that large logits lose nothing.
// Memory: each logit read once, the outputs written once.
//
// Backward (gradient.cuh): softmax(z) less 1 at t, or less 1 / C everywhere.
// Memory: one read of the logits, one write of the gradient.
//
// A target that is neither a class nor -1 makes its row's loss and gradient NaN.
#pragma once

#include "cuda/common.cuh"
#include "cuda/gradient.cuh"
#include "cuda/rows.cuh"

namespace oodk::cuda {

struct OutlierInput {
  const void* logits; // (rows, width), `stride` values from row to row
  DType dtype;
  int64_t rows, width, stride;
  const int64_t* target; // (rows,), any contents
  cudaStream_t stream;
};

// A row's target: a class, or none.
struct OutlierTarget {
  int64_t label;

  __device__ OutlierTarget(const int64_t* target, int64_t row)
      : label(__ldg((const long long*)target + row)) {}
  __device__ bool ood() const {
    return label == -1;
  }
  __device__ bool is_class(int width) const {
    return label >= 0 && label < width;
  }
};

// What is known of a row after some of its columns.
template <typename T>
struct OutlierState {
  T m = -kInf<T>, s = 0, w = 0;

  // Logits x, -inf where not meant, and their distances d from the reference, 0 where not meant.
  template <int N>
  __device__ void add(const T (&x)[N], const T (&d)[N]) {
    const auto plus = [](T a, T b) { return a + b; };
    const T most = larger(m, fold(x, [](T a, T b) { return larger(a, b); })), c = shift(most);
    T e[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
      e[i] = exp_fast(x[i] - c);
    s = s * exp_fast(m - c) + fold(e, plus);
    w += fold(d, plus);
    m = most;
  }

  __device__ void merge(const OutlierState& other) {
    const T most = larger(m, other.m), c = shift(most);
    s = s * exp_fast(m - c) + other.s * exp_fast(other.m - c);
    w += other.w;
    m = most;
  }
};

template <typename S, typename T = acc_t<S>>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<S>) outlier_forward(
    Rows<S> z, Tiling tiling, const int64_t* target, T* loss, T* logsumexp, Stats<T>* stats) {
  constexpr int V = kPerUnit<S>;
  extern __shared__ uint4 shared[];
  auto* const slots = (OutlierState<T>*)((char*)shared + tiling.tile_bytes());
  OutlierState<T> state;
  T reference = 0;
  const auto add = [&](int64_t, bool exists, const Row<S>& row, int unit) {
    if (!exists)
      return;
    if (unit == 0) {
      reference = row[0];
      reference = reference - reference == 0 ? reference : T(0);
    }
    for_units(row, tiling, shared, [&](T(&x)[V], int, unsigned inside) {
      T d[V];
#pragma unroll
      for (int e = 0; e < V; ++e)
        d[e] = x[e] - reference;
      mask(x, inside, -kInf<T>);
      mask(d, inside, T(0));
      state.add(x, d);
    });
  };
  const auto write = [&](int64_t r, bool exists, const Row<S>& row, bool) {
    const OutlierState<T> found = reduce_workers(state, tiling, slots);
    state = {};
    if (!exists || tiling.worker() != 0)
      return;
    const OutlierTarget t(target, r);
    const T m = found.m, s = m == -kInf<T> ? kNaN<T> : found.s, log_s = log_of(s);
    T rest = kNaN<T>;
    if (t.ood())
      rest = (m - reference) - found.w / T(z.width);
    else if (t.is_class(z.width))
      rest = m - row[int(t.label)];
    loss[r] = log_s + rest;
    logsumexp[r] = m + log_s;
    stats[r] = {m, s};
  };
  for_spans(z, tiling, shared, [](int) { return true; }, add, write);
}

template <typename S, typename T = acc_t<S>>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<S>)
    outlier_backward(Rows<S> z, int units, const int64_t* target, const T* grad_loss,
        const T* grad_logsumexp, const Stats<T>* stats, S* grad_logits) {
  constexpr int V = kPerUnit<S>;
  write_gradient(z, units, grad_logits, [&](int64_t r, int column, const T(&x)[V], T(&y)[V]) {
    const OutlierTarget t(target, r);
    const bool is_class = t.is_class(z.width);
    const T g = is_class || t.ood() ? grad_loss[r] : kNaN<T>;
    const Stats<T> of = stats[r];
    const T scale = divide(g + grad_logsumexp[r], of.total),
            bias = t.ood() ? -g / T(z.width) : T(0);
    const int at = is_class ? int(t.label) - column : -1;
#pragma unroll
    for (int e = 0; e < V; ++e)
      y[e] = scale * exp_fast(x[e] - of.m) + (e == at ? -g : bias);
  });
}

// --- host ---------------------------------------------------------------------------------------

template <typename S>
Rows<S> rows_of(const OutlierInput& in) {
  return {(const S*)in.logits, in.rows, in.stride, int(in.width)};
}

// loss and logsumexp are T (rows,), T double for float64 logits and else float; the statistics
// T (rows, 2).
inline void outlier_cross_entropy(
    const OutlierInput& in, void* loss, void* logsumexp, void* stats) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    const Rows<S> z = rows_of<S>(in);
    const Device device = Device::current();
    const Tiling t = tile(z);
    launch(outlier_forward<S, T>, t.blocks(in.rows, device), kRowThreads,
        t.tile_bytes() + t.slot_bytes<OutlierState<T>>(), in.stream, z, t, in.target, (T*)loss,
        (T*)logsumexp, (Stats<T>*)stats);
  });
}

inline void outlier_cross_entropy_backward(const OutlierInput& in, const void* grad_loss,
    const void* grad_logsumexp, const void* stats, void* grad_logits) {
  dispatch(in.dtype, [&](auto s) {
    using S = decltype(s);
    using T = acc_t<S>;
    const Rows<S> z = rows_of<S>(in);
    const GradientGrid grid(z, grad_logits);
    launch(outlier_backward<S, T>, grid.blocks, kBackwardThreads, 0, in.stream, z, grid.units,
        in.target, (const T*)grad_loss, (const T*)grad_logsumexp, (const Stats<T>*)stats,
        (S*)grad_logits);
  });
}

} // namespace oodk::cuda
