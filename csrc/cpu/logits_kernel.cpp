// Scores that need nothing but logits, with z' = z / temperature, from one read of a row:
//
//   m = max z    s = sum e^((z - m) / T)    w = sum (z - m) / T e^((z - m) / T)
//   msp = 1 / s    energy = m + T log s    entropy (negative) = w / s - log s
//
// A row is read along its columns, the second time from cache, and meanwhile the next row is
// fetched. Rows too short for that are transposed, so that lanes are rows (see mos_kernel.cpp).
#include "cpu/logits_kernel.h"

#include "cpu/simd.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

// (z - m) / T, bounded where e^ of it is 0 so that 0 times it is 0; NaN stays.
template <typename T>
OODK_INLINE vec<T> scaled(vec<T> z, vec<T> m, T inverse) {
  return max(splat(T(-1000)), (z - m) * inverse);
}

template <typename T>
struct Sums {
  T m, s, w;
};

template <typename S, typename T = acc_t<S>>
OODK_INLINE Sums<T> along_row(const S* z, const S* next, int64_t n, T inverse) {
  constexpr int L = lanes<T>;
  const T m = max_of(z, n);
  const vec<T> c = splat(m);
  vec<T> s0{}, s1{}, w0{}, w1{};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    __builtin_prefetch(next + i);
    __builtin_prefetch(next + i + L);
    const vec<T> d0 = scaled<T>(load(z + i), c, inverse), e0 = exp(d0);
    const vec<T> d1 = scaled<T>(load(z + i + L), c, inverse), e1 = exp(d1);
    s0 += e0;
    s1 += e1;
    w0 += d0 * e0;
    w1 += d1 * e1;
  }
  for (; i < n; i += L) {
    const int left = int(n - i < L ? n - i : L);
    const vec<T> x = left == L ? load(z + i) : load_first(z + i, left, m);
    const vec<T> d = scaled<T>(x, c, inverse);
    const vec<T> e = exp(d);
    s0 += e;
    w0 += d * e;
    if (left < L) // the filled lanes added e^0 each
      s0[L - 1] -= T(L - left);
  }
  return {m, reduce_add(s0 + s1), reduce_add(w0 + w1)};
}

template <typename S>
struct Output {
  using T = acc_t<S>;
  T temperature;
  T *msp, *max_logit, *energy, *entropy;
  int64_t* label;

  // Row r from its sums. s is NaN where the row holds NaN or its maximum is infinite.
  void write(int64_t r, const S* z, int64_t width, Sums<T> sums) const {
    auto [m, s, w] = sums;
    T e = m + temperature * std::log(s);
    int64_t first = 0;
    if (s != s) {
      m = widen(z[0]);
      for (int64_t j = 0; j < width; ++j) {
        const T x = widen(z[j]);
        if (x > m || (x != x && m == m)) {
          m = x;
          first = j;
        }
      }
      e = m;
    } else {
      first = find_first(z, width, m);
    }
    msp[r] = 1 / s;
    max_logit[r] = m;
    energy[r] = e;
    entropy[r] = w / s - std::log(s);
    label[r] = first;
  }
};

void scores(const void* logits, DType dtype, int64_t width, int64_t stride, double temperature,
    int64_t begin, int64_t end, void* msp, void* max_logit, void* energy, void* entropy,
    int64_t* label) {
  dispatch(dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = acc_t<S>;
    constexpr int L = lanes<T>;
    const Output<S> out{T(temperature), (T*)msp, (T*)max_logit, (T*)energy, (T*)entropy, label};
    const T inverse = T(1 / temperature);
    const auto row = [&](int64_t r) { return (const S*)logits + r * stride; };
    if (width >= 4 * L) {
      for (int64_t r = begin; r < end; ++r) {
        const S* next = row(r + 1 < end ? r + 1 : r);
        out.write(r, row(r), width, along_row(row(r), next, width, inverse));
      }
      return;
    }
    vec<T> z[4 * L];
    for (int64_t first = begin; first < end; first += L) {
      const int count = int(end - first < L ? end - first : L);
      const S* rows[L];
      for (int r = 0; r < L; ++r)
        rows[r] = row(first + (r < count ? r : count - 1));
      load_columns(rows, width, 0, width, z);
      vec<T> m = z[0], s{}, w{};
      for (int64_t j = 1; j < width; ++j)
        m = max(z[j], m);
      for (int64_t j = 0; j < width; ++j) {
        const vec<T> d = scaled<T>(z[j], m, inverse), e = exp(d);
        s += e;
        w += d * e;
      }
      for (int r = 0; r < count; ++r)
        out.write(first + r, rows[r], width, {m[r], s[r], w[r]});
    }
  });
}

} // namespace

extern const LogitKernels logit_kernels = {scores};

} // namespace OODK_CPU_NS
} // namespace oodk
