// Scores that need nothing but logits, with z' = z / temperature, from one read of a row:
//
//   m = max z    s = sum e^((z - m) / T)    w = sum (z - m) / T e^((z - m) / T)
//   msp = 1 / s    energy = m + T log s    entropy (negative) = w / s - log s
//
// A row is read along its columns: while it is added up, the maximum of the next one is taken, so
// that memory is read all the time. Sums stay in the lanes they came in until those of `lanes` rows
// are there, and are reduced together. Rows too short for that are transposed, so that lanes are
// rows.
#include "cpu/logits_kernel.h"

#include "cpu/simd.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

// (z - m) / T, bounded where e^ of it is 0 beside 1, so that 0 times it is 0; NaN stays.
template <typename T>
OODK_INLINE vec<T> scaled(vec<T> z, vec<T> m, T inverse) {
  return max(splat(kLeast<T>), (z - m) * inverse);
}

template <typename T>
struct Sums {
  vec<T> s, w;
};

// The sums of a row of n >= lanes values whose maximum is m, lane by lane; makes m the next row's.
template <typename S, typename T = acc_t<S>>
OODK_INLINE Sums<T> along_row(const S* z, const S* next, int64_t n, T inverse, T* m) {
  constexpr int L = lanes<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const vec<T> c = splat(*m);
  vec<T> s0{}, s1{}, w0{}, w1{}, m0 = splat(-inf), m1 = m0;
  const auto add = [&](vec<T> x, vec<T>& s, vec<T>& w) {
    const vec<T> d = scaled<T>(x, c, inverse), e = exp_normal(d);
    s += e;
    w += d * e;
  };
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    vec<T> a, b;
    load_two(next + i, a, b);
    m0 = max(a, m0);
    m1 = max(b, m1);
    // Rows ahead, to the second-level cache: a processor's own prefetching ends with a page.
    const S* const ahead = next + 3 * (next - z) + i;
    __builtin_prefetch(ahead, 0, 2);
    if constexpr (sizeof(S) == sizeof(T))
      __builtin_prefetch(ahead + L, 0, 2);
    load_two(z + i, a, b);
    add(a, s0, w0);
    add(b, s1, w1);
  }
  if (i + L <= n) {
    m0 = max(load(next + i), m0);
    add(load(z + i), s0, w0);
    i += L;
  }
  if (i < n) {
    m1 = max(load_last(next, i, n, -inf), m1);
    add(load_last(z, i, n, -inf), s1, w1);
  }
  *m = reduce_max(max(m0, m1));
  return {s0 + s1, w0 + w1};
}

template <typename S>
struct Output {
  using T = acc_t<S>;
  T temperature;
  T *msp, *max_logit, *energy, *entropy;
  int64_t* label;

  // `count` rows from `first` on, as lanes. s is NaN where a row holds NaN or its maximum is infinite.
  void write(int64_t first, int count, const S* const* rows, int64_t width, vec<T> m, vec<T> s,
      vec<T> w) const {
    const vec<T> log_s = log(s);
    rows_to(msp + first, count, T(1) / s);
    rows_to(max_logit + first, count, m);
    rows_to(energy + first, count, m + temperature * log_s);
    rows_to(entropy + first, count, w / s - log_s);
    for (int r = 0; r < count; ++r)
      label[first + r] = find_first(rows[r], width, T(m[r]));
    const ivec<T> special = s != s;
    if (any<T>(special)) [[unlikely]]
      for (int r = 0; r < count; ++r)
        if (special[r])
          write_special(first + r, rows[r], width);
  }

 private:
  static void rows_to(T* to, int count, vec<T> value) {
    count == lanes<T> ? store(to, value) : store_first(to, count, value);
  }

  void write_special(int64_t r, const S* z, int64_t width) const {
    T m = widen(z[0]);
    int64_t first = 0;
    for (int64_t j = 0; j < width; ++j) {
      const T x = widen(z[j]);
      if (x > m || (x != x && m == m)) {
        m = x;
        first = j;
      }
    }
    max_logit[r] = energy[r] = m;
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
    const auto row = [&](int64_t r) { return (const S*)logits + (r < end ? r : end - 1) * stride; };
    const bool along = width >= 4 * L;
    T next = along && begin < end ? max_of(row(begin), width) : T(0);
    for (int64_t first = begin; first < end; first += L) {
      const int count = int(end - first < L ? end - first : L);
      const S* rows[L];
      for (int r = 0; r < L; ++r)
        rows[r] = row(first + r);
      if (along) {
        T m[L];
        vec<T> s[L], w[L];
        for (int r = 0; r < count; ++r) {
          m[r] = next;
          const Sums<T> sums = along_row(rows[r], row(first + r + 1), width, inverse, &next);
          s[r] = sums.s;
          w[r] = sums.w;
        }
        for (int r = count; r < L; ++r) { // as the last one
          m[r] = m[r - 1];
          s[r] = s[r - 1];
          w[r] = w[r - 1];
        }
        const auto add = [](vec<T> a, vec<T> b) { return a + b; };
        out.write(
            first, count, rows, width, load(m), reduce_each<T>(s, add), reduce_each<T>(w, add));
        continue;
      }
      vec<T> z[4 * L];
      load_columns(rows, width, 0, width, z);
      vec<T> m = z[0], s{}, w{};
      for (int64_t j = 1; j < width; ++j)
        m = max(z[j], m);
      for (int64_t j = 0; j < width; ++j) {
        const vec<T> d = scaled<T>(z[j], m, inverse), e = exp_normal(d);
        s += e;
        w += d * e;
      }
      out.write(first, count, rows, width, m, s, w);
    }
  });
}

} // namespace

extern const LogitKernels logit_kernels = {scores};

} // namespace OODK_CPU_NS
} // namespace oodk
