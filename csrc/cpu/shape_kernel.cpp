// Shaping rows of features in place: ReAct's clip, VRA, ASH, SCALE and OptFS.
#include "cpu/shape_kernel.h"

#include "cpu/ranking.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

// Columns [begin, end) of a row become f(values). x: the values, readable a vector beyond.
template <typename S, typename T, typename F>
OODK_INLINE void rewrite(S* row, const T* x, int64_t begin, int64_t end, const F& f) {
  constexpr int L = lanes<T>;
  int64_t i = begin;
  for (; i + L <= end; i += L)
    store(row + i, f(load(x + i)));
  if (i < end)
    store_first(row + i, int(end - i), f(load(x + i)));
}

template <typename S, typename T = acc_t<S>>
void bound(S* row, int64_t n, const T* low, int64_t low_step, const T* high, int64_t high_step) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < n; i += L) {
    const int left = int(n - i < L ? n - i : L);
    const auto limit = [&](const T* limits, int64_t step) {
      return step ? load_first(limits + i, left, T(0)) : splat(limits[0]);
    };
    const vec<T> x = load_first(row + i, left, T(0)), most = limit(high, high_step);
    vec<T> y = x > most ? most : x; // NaN stays
    if (low)
      y = x < limit(low, low_step) ? vec<T>{} : y;
    store_first(row + i, left, y);
  }
}

template <typename T>
OODK_INLINE vec<T> gather(const T* from, ivec<T> at) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_i32gather_ps((__m512i)at, from, 4);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    return _mm256_i32gather_ps(from, (__m256i)at, 4);
#endif
  vec<T> value;
  for (int j = 0; j < lanes<T>; ++j)
    value[j] = from[at[j]];
  return value;
}

// Values in [edges[k], edges[k + 1]) times factors[k], others 0; NaN stays. The edges ascend.
template <typename S, typename T = acc_t<S>>
void weigh(S* row, int64_t n, const T* edges, const T* factors, int64_t bins) {
  constexpr int L = lanes<T>;
  const T first = edges[0], end = edges[bins], width = (end - first) / T(bins);
  const vec<T> last = splat(T(bins - 1));
  for (int64_t i = 0; i < n; i += L) {
    const int left = int(n - i < L ? n - i : L);
    const vec<T> x = load_first(row + i, left, T(0));
    const ivec<T> inside = (x >= splat(first)) & (x < splat(end));
    const vec<T> guess = max((x - splat(first)) / splat(width), vec<T>{}); // 0 where NaN
    ivec<T> k = __builtin_convertvector(guess < last ? guess : last, ivec<T>);
    // Of equal bins it is the right one but for rounding; others are looked for.
    const ivec<T> off = (x < gather(edges, k)) | (x >= gather(edges + 1, k));
    if (any<T>(off & inside))
      for (int j = 0; j < L; ++j)
        if (inside[j]) {
          while (x[j] < edges[k[j]])
            --k[j];
          while (x[j] >= edges[k[j] + 1])
            ++k[j];
        }
    const vec<T> y = inside ? x * gather(factors, k) : vec<T>{};
    store_first(row + i, left, x == x ? y : x);
  }
}

// The first column after the `wanted` first values that equal `value`.
template <typename T>
int64_t end_of(const T* x, int64_t n, T value, int64_t wanted) {
  int64_t equal = 0;
  for (int64_t i = 0; i < n; ++i)
    equal += x[i] == value;
  if (equal == wanted)
    return n;
  int64_t i = 0;
  for (; wanted > 0; ++i)
    wanted -= x[i] == value;
  return i;
}

template <typename S, typename T = acc_t<S>>
void reshape(S* row, int64_t n, Shape shape, int64_t k, Ranking<T>& ranking) {
  const RowSums sums = ranking.read(row, false);
  const T* const x = ranking.values();
  if (ranking.nan()) {
    const vec<T> nan = splat(std::numeric_limits<T>::quiet_NaN());
    rewrite(row, x, 0, n, [&](vec<T>) { return nan; });
    return;
  }
  ranking.rank(k);
  const auto last = ranking.find(ranking.want(k));
  const vec<T> factor = splat(T(std::exp(sums.sum / last.sum)));
  if (shape == Shape::scale) {
    rewrite(row, x, 0, n, [&](vec<T> v) { return v * factor; });
    return;
  }
  // Of values that equal the last one kept, those of lower columns are kept.
  const int64_t end = end_of(x, n, last.value, k - last.greater);
  const vec<T> least = splat(last.value), mean = splat(T(sums.sum / double(k)));
  const auto kept = [&](vec<T> v) {
    return shape == Shape::ash_p ? v : shape == Shape::ash_b ? mean : v * factor;
  };
  rewrite(row, x, 0, end, [&](vec<T> v) { return v >= least ? kept(v) : vec<T>{}; });
  rewrite(row, x, end, n, [&](vec<T> v) { return v > least ? kept(v) : vec<T>{}; });
}

void shape(void* features, DType dtype, int64_t width, int64_t stride, Shape shape, int64_t k,
    const void* low, int64_t low_step, const void* high, int64_t high_step, int64_t begin,
    int64_t end) {
  dispatch(dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = acc_t<S>;
    const bool bounded = shape == Shape::clip || shape == Shape::vra;
    Ranking<T> ranking(bounded || shape == Shape::optfs ? 1 : width);
    for (int64_t r = begin; r < end; ++r) {
      S* const row = (S*)features + r * stride;
      if (bounded)
        bound<S>(row, width, (const T*)low, low_step, (const T*)high, high_step);
      else if (shape == Shape::optfs)
        weigh<S>(row, width, (const T*)low, (const T*)high, k);
      else
        reshape<S>(row, width, shape, k, ranking);
    }
  });
}

} // namespace

extern const ShapeKernels shape_kernels = {shape};

} // namespace OODK_CPU_NS
} // namespace oodk
