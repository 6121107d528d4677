// Cross entropy of rows with a target class t, uniform cross entropy of those without, for OOD:
//
//   m = max z    s = sum e^(z - m)    w = sum (z - m)
//   logsumexp = m + log s    loss = log s + m - z_t,    for OOD log s - w / C
//
// and their gradient, softmax(z) less 1 at t, or less 1 / C everywhere. A row is read along its
// columns, the second time from cache; short rows are transposed (see mos_kernel.cpp).
#include "cpu/outlier_kernel.h"

#include "cpu/simd.h"
#include "cpu/softmax_gradient.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

constexpr int64_t kOod = -1;

template <typename T>
struct Sums {
  T m, s, w;
};

// Of n adjacent logits: w where it is asked for, and the e^(z - m), in whole vectors. Meanwhile the
// next row is fetched.
template <bool kMean, bool kKeep, typename S, typename T = acc_t<S>>
OODK_INLINE Sums<T> along_row(
    const S* z, const S* next, int64_t n, [[maybe_unused]] acc_t<S>* kept = nullptr) {
  constexpr int L = lanes<T>;
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  const T m = n >= L ? max_of(z, n) : reduce_max(load_first(z, int(n), nothing));
  const vec<T> c = splat(m);
  vec<T> s0{}, s1{}, w0{}, w1{};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const vec<T> d0 = load(z + i) - c, e0 = exp(d0);
    const vec<T> d1 = load(z + i + L) - c, e1 = exp(d1);
    __builtin_prefetch(next + i);
    __builtin_prefetch(next + i + L);
    s0 += e0;
    s1 += e1;
    if (kMean) {
      w0 += d0;
      w1 += d1;
    }
    if (kKeep) {
      store(kept + i, e0);
      store(kept + i + L, e1);
    }
  }
  for (; i < n; i += L) {
    const int left = int(n - i < L ? n - i : L);
    const vec<T> e = exp((left == L ? load(z + i) : load_first(z + i, left, nothing)) - c);
    s0 += e;
    if (kMean)
      w0 += (left == L ? load(z + i) : load_first(z + i, left, m)) - c;
    if (kKeep)
      store(kept + i, e);
  }
  return {m, reduce_add(s0 + s1), kMean ? reduce_add(w0 + w1) : T(0)};
}

void forward(
    const OutlierRows& in, int64_t begin, int64_t end, void* loss, void* logsumexp, void* stats) {
  dispatch(in.dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = acc_t<S>;
    constexpr int L = lanes<T>;
    const auto row = [&](int64_t r) { return (const S*)in.logits + r * in.stride; };
    const auto write = [&](int64_t r, Sums<T> sums, T log_s) {
      const int64_t t = in.target[r];
      ((T*)loss)[r] = log_s + (t == kOod ? -sums.w / T(in.width) : sums.m - widen(row(r)[t]));
      ((T*)logsumexp)[r] = sums.m + log_s;
      ((T*)stats)[2 * r] = sums.m;
      ((T*)stats)[2 * r + 1] = sums.s;
    };
    if (in.width >= 4 * L) {
      for (int64_t r = begin; r < end; ++r) {
        const S* next = row(r + 1 < end ? r + 1 : r);
        const Sums<T> sums = in.target[r] == kOod ? along_row<true, false>(row(r), next, in.width)
                                                  : along_row<false, false>(row(r), next, in.width);
        write(r, sums, std::log(sums.s));
      }
      return;
    }
    vec<T> z[4 * L];
    for (int64_t first = begin; first < end; first += L) {
      const int count = int(end - first < L ? end - first : L);
      const S* rows[L];
      for (int r = 0; r < L; ++r)
        rows[r] = row(first + (r < count ? r : count - 1));
      load_columns(rows, in.width, 0, in.width, z);
      vec<T> m = z[0], s{}, w{};
      for (int64_t j = 1; j < in.width; ++j)
        m = max(z[j], m);
      for (int64_t j = 0; j < in.width; ++j) {
        const vec<T> d = z[j] - m;
        s += exp(d);
        w += d;
      }
      const vec<T> log_s = log(s);
      for (int r = 0; r < count; ++r)
        write(first + r, {m[r], s[r], w[r]}, log_s[r]);
    }
  });
}

void backward(const OutlierRows& in, int64_t begin, int64_t end, const void* grad_loss,
    const void* grad_logsumexp, const void* stats, void* grad_logits) {
  dispatch(in.dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = acc_t<S>;
    for (int64_t r = begin; r < end; ++r) {
      const S* row = (const S*)in.logits + r * in.stride;
      S* to = (S*)grad_logits + r * in.width;
      const int64_t t = in.target[r];
      const T g = ((const T*)grad_loss)[r];
      const T m = ((const T*)stats)[2 * r], s = ((const T*)stats)[2 * r + 1];
      const T scale = (g + ((const T*)grad_logsumexp)[r]) / s;
      const T bias = t == kOod ? -g / T(in.width) : T(0);
      scaled_softmax(row, in.width, in.width, m, scale, bias, to);
      if (t != kOod)
        add_onehot(row + t, m, scale, -g, to + t);
    }
  });
}

// Both in one read of the logits and one write of the gradient: e^(z - m) of the row stays in cache.
void loss_and_gradient(const OutlierRows& in, int64_t begin, int64_t end,
    const OutlierWeights& weights, void* loss, void* grad_logits) {
  dispatch(in.dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = acc_t<S>;
    constexpr int L = lanes<T>;
    const int64_t n = in.width;
    const VectorBuffer<T> kept(n + L);
    for (int64_t r = begin; r < end; ++r) {
      const S* row = (const S*)in.logits + r * in.stride;
      S* to = (S*)grad_logits + r * n;
      const int64_t absent = weights.absent ? n - 1 : kOod;
      const bool ood = in.target[r] == kOod || in.target[r] == absent;
      const int64_t t = ood ? absent : in.target[r];
      const S* next = r + 1 < end ? row + in.stride : row;
      const Sums<T> sums = t == kOod ? along_row<true, true>(row, next, n, kept)
                                     : along_row<false, true>(row, next, n, kept);
      const T weight = T(ood ? weights.ood : weights.id);
      ((T*)loss)[r] =
          weight * (std::log(sums.s) + (t == kOod ? -sums.w / T(n) : sums.m - widen(row[t])));
      const T factor = weight / sums.s;
      const vec<T> scale = splat(factor), bias = splat(t == kOod ? -weight / T(n) : T(0));
      int64_t i = 0;
      for (; i + L <= n; i += L)
        store(to + i, load((const T*)kept + i) * scale + bias);
      if (i < n)
        store_first(to + i, int(n - i), load((const T*)kept + i) * scale + bias);
      if (t != kOod)
        narrow(kept[t] * factor - weight, to + t);
    }
  });
}

} // namespace

extern const OutlierKernels outlier_kernels = {forward, backward, loss_and_gradient};

} // namespace OODK_CPU_NS
} // namespace oodk
