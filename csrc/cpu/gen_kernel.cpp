// GEN: -sum (p (1 - p))^gamma over the m largest of p = softmax(z), in logarithms. With s the sum of
// e^z over all but the largest, log (1 - p) = log s - log sum e^z of the largest, where 1 - p would
// cancel; else it is taken as it is.
//
// A row is read from memory once. Its m largest need not be sorted: halving finds a bound that just
// so many are above, and where equal values leave none, ranking.h finds the m-th largest.
#include "cpu/gen_kernel.h"

#include "cpu/ranking.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

// e^(z - shift) added up over all but z[without].
template <typename T>
T sum_of_others(const T* z, int64_t n, int64_t without, T shift) {
  constexpr int L = lanes<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const vec<T> c = splat(shift);
  vec<T> s[4] = {};
  int64_t i = 0;
  const auto add = [&](int j, int64_t at, int left) {
    vec<T> x = load_first(z + at, left, -inf);
    if (without >= at && without < at + left)
      x[without - at] = -inf;
    s[j] += exp(x - c);
  };
  for (; i + 4 * L <= n; i += 4 * L) {
    if (without >= i && without < i + 4 * L) {
      for (int j = 0; j < 4; ++j)
        add(j, i + j * L, L);
      continue;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      s[j] += exp(load(z + i + j * L) - c);
  }
  for (; i < n; i += L)
    add(0, i, int(n - i < L ? n - i : L));
  return reduce_add((s[0] + s[1]) + (s[2] + s[3]));
}

// Log of the sum of e^(z - largest) over all but z[at], the first that equals the largest.
template <typename T>
T log_of_others(const T* z, int64_t n, int64_t at, T largest) {
  const T s = sum_of_others(z, n, at, largest);
  if (s > T(1e-20)) // what e^x has rounded to 0 is nothing beside it
    return std::log(s);
  T second = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < n; ++i)
    second = i != at && z[i] > second ? z[i] : second;
  if (second - second != 0)
    return second;
  return second - largest + std::log(sum_of_others(z, n, at, second));
}

template <typename T>
class Largest {
 public:
  explicit Largest(int64_t width)
      : ranking(width), found_(width + lanes<T>), some_(width + lanes<T>), width_(width) {}

  Ranking<T> ranking;

  // The k largest of the row that `ranking` has read, those above the k-th in the order of columns.
  const T* find(int64_t k) {
    const T* from = ranking.values();
    if (k == width_)
      return from;
    T bound = ranking.low(), above = ranking.high();
    for (int64_t n = width_;;) {
      const T middle = bound + (above - bound) / 2;
      if (!(middle > bound && middle < above))
        break;
      const int64_t greater = count_greater(from, n, middle);
      if (greater == k) {
        copy_greater(from, n, middle, &found_[0]);
        return found_;
      }
      if (greater < k) {
        above = middle;
        continue;
      }
      bound = middle;
      if (2 * greater < n) { // in place, for it is moved forward
        n = copy_greater(from, n, middle, &some_[0]);
        from = some_;
      }
    }
    ranking.rank(k);
    const auto last = ranking.find(ranking.want(k));
    copy_greater(ranking.values(), width_, last.value, &found_[0]);
    for (int64_t i = last.greater; i < k; ++i)
      found_[i] = last.value;
    return found_;
  }

 private:
  VectorBuffer<T> found_, some_;
  int64_t width_;
};

void scores(const void* logits, DType dtype, int64_t width, int64_t stride, const double* gamma,
    const int64_t* m, int64_t count, int64_t begin, int64_t end, void* out) {
  dispatch(dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = acc_t<S>;
    constexpr int L = lanes<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    Largest<T> largest(width);
    Ranking<T>& ranking = largest.ranking;
    VectorBuffer<T> logs(width + L);
    for (int64_t r = begin; r < end; ++r) {
      T* const score = (T*)out + r * count;
      ranking.read_plain((const S*)logits + r * stride);
      const T top = ranking.high();
      if (ranking.nan() || top - top != 0) {
        for (int64_t i = 0; i < count; ++i)
          score[i] = std::numeric_limits<T>::quiet_NaN();
        continue;
      }
      const T* const z = ranking.values();
      const T log_others = log_of_others(z, width, find_first(z, width, top), top);
      const T log_all = std::log1p(std::exp(log_others)), log_top = log_others - 2 * log_all;
      int64_t k = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (m[i] != k) {
          k = m[i];
          const T* const x = largest.find(k);
          for (int64_t j = 0; j < k; j += L) {
            const vec<T> one = load_first(x + j, int(k - j < L ? k - j : L), -inf);
            const vec<T> log_p = one - splat(top) - splat(log_all);
            const vec<T> both = log_p + log(splat(T(1)) - exp(log_p));
            store(&logs[j], one == splat(top) ? splat(log_top) : both);
          }
        }
        const vec<T> g = splat(T(gamma[i]));
        Adder<T> sum;
        for (int64_t j = 0; j < k; j += L) // after the last are logarithms of 0
          sum.add(exp(load(&logs[j]) * g));
        score[i] = T(-sum.total());
      }
    }
  });
}

} // namespace

extern const GenKernels gen_kernels = {scores};

} // namespace OODK_CPU_NS
} // namespace oodk
