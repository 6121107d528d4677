// GEN: -sum (p (1 - p))^gamma over the m largest of p = softmax(z), in logarithms. With s the sum of
// e^z over all but the largest, log (1 - p) = log s - log sum e^z of the largest, where 1 - p would
// cancel; else it is taken as it is.
//
// A row is read from memory once. Its m largest need not be sorted. What is above a bound that many
// rows share is copied; among few, each one's rank is counted; among many, halving finds a bound
// that just so many are above; and where equal values leave none, ranking.h finds the m-th largest.
#include "cpu/gen_kernel.h"

#include "cpu/ranking.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

// e^(z - shift) added up over all but z[without]. Meanwhile the next row is fetched.
template <typename T, typename S>
T sum_of_others(const T* z, int64_t n, int64_t without, T shift, const S* next) {
  constexpr int L = lanes<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const vec<T> c = splat(shift);
  vec<T> s[4] = {};
  int64_t i = 0;
  const auto add = [&](int j, int64_t at, int left) {
    vec<T> x = load_first(z + at, left, -inf);
    if (without >= at && without < at + left)
      x[without - at] = -inf;
    s[j] += exp_normal(max(splat(kLeast<T>), x - c));
  };
  for (; i + 4 * L <= n; i += 4 * L) {
#pragma GCC unroll 4
    for (int j = 0; j < int(4 * L * sizeof(S)); j += 64)
      __builtin_prefetch((const char*)(next + i) + j);
    if (without >= i && without < i + 4 * L) {
      for (int j = 0; j < 4; ++j)
        add(j, i + j * L, L);
      continue;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      s[j] += exp_normal(max(splat(kLeast<T>), load(z + i + j * L) - c));
  }
  for (; i < n; i += L)
    add(0, i, int(n - i < L ? n - i : L));
  return reduce_add((s[0] + s[1]) + (s[2] + s[3]));
}

// Values among which each one's rank is counted.
template <typename T>
constexpr int64_t kRanked = 3 * lanes<T>;

// Log of the sum of e^(z - largest) over all but z[at], the first that equals the largest.
template <typename T, typename S>
T log_of_others(const T* z, int64_t n, int64_t at, T largest, const S* next) {
  const T s = sum_of_others(z, n, at, largest, next);
  if (s != s)
    return s;
  if (s > T(1e-20)) // what e^x has rounded to 0 is nothing beside it
    return std::log(s);
  T second = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < n; ++i)
    second = i != at && z[i] > second ? z[i] : second;
  if (second - second != 0)
    return second;
  return second - largest + std::log(sum_of_others(z, n, at, second, next));
}

// The values of a row, and the largest of them.
template <typename T>
class Largest {
 public:
  Largest(int64_t width, int64_t slots)
      : ranking_(width),
        values_(width + lanes<T>),
        found_(width + lanes<T>),
        some_(width + lanes<T>),
        guess_(slots),
        width_(width) {
    for (int64_t i = 0; i < slots; ++i)
      guess_[i] = std::numeric_limits<T>::infinity(); // none
  }

  template <typename S>
  void read(const S* row) {
    constexpr int L = lanes<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    vec<T> high = splat(-inf), low = splat(inf);
    const auto add = [&](int64_t i, vec<T> x, vec<T> least) {
      if constexpr (!std::is_same_v<S, T>)
        store(values_ + i, x); // there is room after the last
      high = max(x, high);
      low = min(least, low);
    };
    int64_t i = 0;
    for (; i + L <= width_; i += L) {
      const vec<T> x = load(row + i);
      add(i, x, x);
    }
    if (const int left = int(width_ - i))
      add(i, load_first(row + i, left, -inf), load_first(row + i, left, inf));
    high_ = reduce_max(high);
    low_ = -reduce_max(-low);
    if constexpr (std::is_same_v<S, T>)
      row_ = row;
    else
      row_ = values_;
  }

  const T* values() const {
    return row_;
  }
  T high() const { // NaN aside
    return high_;
  }

  // The k largest of the row, which holds no NaN: in the order of columns, but where the k-th is one
  // of equals that are not all among them, those come last. `slot` says which of several k it is.
  const T* find(int64_t k, int64_t slot) {
    if (k == width_)
      return row_;
    T bound = low_, above = high_;
    const T* from = row_;
    int64_t n = width_, least = 0, most = width_; // greater than `above`, than `bound`
    // Rows are much alike: what few more were above in the one before. It changes but the time.
    T& guess = guess_[slot];
    if (guess > bound && guess < above) {
      const int64_t greater = copy_greater(row_, width_, guess, &some_[0]);
      if (greater == k)
        return some_;
      if (greater < k) {
        above = guess;
        least = greater;
      } else {
        from = some_;
        bound = guess;
        n = most = greater;
      }
    }
    for (T value;;) {
      if (most - least <= kRanked<T> && rank_few(from, n, bound, above, k - least, &value)) {
        guess = value - (high_ - value) / 6;
        return take(from, n, k, value);
      }
      const T middle = bound + (above - bound) / 2;
      if (!(middle > bound && middle < above))
        break;
      const int64_t greater = count_greater(from, n, middle);
      if (greater < k) {
        above = middle;
        least = greater;
        continue;
      }
      bound = middle;
      most = greater;
      if (greater == k) {
        guess = middle - (high_ - middle) / 6;
        copy_greater(from, n, middle, &found_[0]);
        return found_;
      }
      if (2 * greater < n) { // in place, for it is moved forward
        n = copy_greater(from, n, middle, &some_[0]);
        from = some_;
      }
    }
    ranking_.read_plain(row_);
    ranking_.rank(k);
    return take(row_, width_, k, ranking_.find(ranking_.want(k)).value);
  }

 private:
  // The k largest of n values, of which the k-th is `last`.
  const T* take(const T* x, int64_t n, int64_t k, T last) {
    const T below = std::nextafter(last, -std::numeric_limits<T>::infinity());
    if (copy_greater(x, n, below, &found_[0]) != k)
      for (int64_t i = copy_greater(x, n, last, &found_[0]); i < k; ++i)
        found_[i] = last;
    return found_;
  }

  // The k-th largest of those of n values that are in (bound, above], kRanked at most, by how many
  // are greater than each; false where there are no k of them, and where there are no masks.
  bool rank_few(const T* x, int64_t n, T bound, T above, int64_t k, T* value) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {
      constexpr int L = lanes<T>;
      constexpr T inf = std::numeric_limits<T>::infinity();
      alignas(64) T few[kRanked<T> + L];
      for (int i = 0; i < kRanked<T>; i += L)
        store(few + i, splat(-inf));
      int64_t count = 0;
      for (int64_t i = 0; i < n; i += L) {
        const vec<T> some = load_first(x + i, int(n - i < L ? n - i : L), -inf);
        const __mmask16 kept = _mm512_mask_cmp_ps_mask(
            _mm512_cmp_ps_mask(some, splat(bound), _CMP_GT_OQ), some, splat(above), _CMP_LE_OQ);
        _mm512_mask_storeu_ps(few + count, __mmask16((1u << __builtin_popcount(kept)) - 1),
            _mm512_maskz_compress_ps(kept, some));
        count += __builtin_popcount(kept);
      }
      if (count < k)
        return false;
      const vec<T> a = load(few), b = load(few + L), c = load(few + 2 * L);
      uint64_t kept = 0;
      for (int64_t j = 0; j < count; ++j) {
        const vec<T> one = splat(few[j]);
        const int greater = __builtin_popcount(_mm512_cmp_ps_mask(a, one, _CMP_GT_OQ)) +
            __builtin_popcount(_mm512_cmp_ps_mask(b, one, _CMP_GT_OQ)) +
            __builtin_popcount(_mm512_cmp_ps_mask(c, one, _CMP_GT_OQ));
        kept |= uint64_t(greater < k) << j;
      }
      const vec<T> least = min(_mm512_mask_mov_ps(splat(inf), __mmask16(kept), a),
          min(_mm512_mask_mov_ps(splat(inf), __mmask16(kept >> L), b),
              _mm512_mask_mov_ps(splat(inf), __mmask16(kept >> 2 * L), c)));
      *value = _mm512_reduce_min_ps(least);
      return true;
    }
#endif
    return false;
  }

  Ranking<T> ranking_;
  VectorBuffer<T> values_, found_, some_, guess_;
  const T* row_ = nullptr;
  int64_t width_;
  T high_ = 0, low_ = 0;
};

void scores(const void* logits, DType dtype, int64_t width, int64_t stride, const double* gamma,
    const int64_t* m, int64_t count, int64_t begin, int64_t end, void* out) {
  dispatch(dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = acc_t<S>;
    constexpr int L = lanes<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    Largest<T> largest(width, count);
    VectorBuffer<T> logs(width + L);
    for (int64_t r = begin; r < end; ++r) {
      T* const score = (T*)out + r * count;
      const S* const row = (const S*)logits + r * stride;
      largest.read(row);
      const T* const z = largest.values();
      const T top = largest.high();
      const T log_others = top - top == 0
          ? log_of_others(z, width, find_first(z, width, top), top, row + stride)
          : std::numeric_limits<T>::quiet_NaN();
      if (log_others != log_others) { // NaN in the row, or infinite at the top
        for (int64_t i = 0; i < count; ++i)
          score[i] = std::numeric_limits<T>::quiet_NaN();
        continue;
      }
      const T log_all = std::log1p(std::exp(log_others)), log_top = log_others - 2 * log_all;
      int64_t k = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (m[i] != k) {
          k = m[i];
          const T* const x = largest.find(k, i);
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
