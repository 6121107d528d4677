// The largest values of a row: for any number of k the k-th largest, and the sum of the k largest.
//
// A few halvings of the row's range find a bound that no wanted value is below; what is above it is
// dealt into bins of equal width, largest first, and only the bins that hold a k-th largest value
// are sorted. Bins depend on the row alone, and sums on the bins, so that what is found for a k does
// not depend on which others are asked for.
#pragma once

#include "cpu/simd.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

// Descending; no NaN. Insertion for few, a heap for many.
template <typename T>
void sort_descending(T* x, int64_t n) {
  if (n <= 24) {
    for (int64_t i = 1; i < n; ++i) {
      const T value = x[i];
      int64_t j = i;
      for (; j > 0 && x[j - 1] < value; --j)
        x[j] = x[j - 1];
      x[j] = value;
    }
    return;
  }
  const auto sink = [x](int64_t at, int64_t end) { // in a heap whose parents are the smaller
    const T value = x[at];
    for (int64_t child; (child = 2 * at + 1) < end; at = child) {
      child += child + 1 < end && x[child + 1] < x[child];
      if (!(x[child] < value))
        break;
      x[at] = x[child];
    }
    x[at] = value;
  };
  for (int64_t i = n / 2 - 1; i >= 0; --i)
    sink(i, n);
  for (int64_t end = n - 1; end > 0; --end) {
    const T least = x[0];
    x[0] = x[end];
    x[end] = least;
    sink(0, end);
  }
}

template <typename T>
int64_t count_greater(const T* x, int64_t n, T bound) {
  constexpr int L = lanes<T>;
  int64_t i = 0, count = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    for (; i + L <= n; i += L)
      count += __builtin_popcount(_mm512_cmp_ps_mask(load(x + i), splat(bound), _CMP_GT_OQ));
#endif
  ivec<T> a{}, b{};
  for (; i + 2 * L <= n; i += 2 * L) {
    a -= load(x + i) > splat(bound);
    b -= load(x + i + L) > splat(bound);
  }
  a += b;
  for (int j = 0; j < L; ++j)
    count += a[j];
  for (; i < n; ++i)
    count += x[i] > bound;
  return count;
}

// Those greater than `bound`, in their order, to `to`, which may be x and has room for n and a vector
// more; how many there are.
template <typename T>
int64_t copy_greater(const T* x, int64_t n, T bound, T* to) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    for (constexpr int L = lanes<T>; i + L <= n; i += L) {
      const __m512 some = load(x + i);
      const __mmask16 kept = _mm512_cmp_ps_mask(some, splat(bound), _CMP_GT_OQ);
      store(to + count, (vec<T>)_mm512_maskz_compress_ps(kept, some));
      count += __builtin_popcount(kept);
    }
#endif
  for (; i < n; ++i) {
    to[count] = x[i];
    count += x[i] > bound;
  }
  return count;
}

struct RowSums {
  double l1, l2, sum;
};

// Adds up in double precision.
template <typename T>
struct Adder {
  vec<double> a{}, b{};

  OODK_INLINE void add(vec<T> x) {
    each(x, [](vec<double> y) { return y; });
  }
  OODK_INLINE void add_abs(vec<T> x) {
    each(x, [](vec<double> y) { return y < 0 ? -y : y; });
  }
  OODK_INLINE void add_square(vec<T> x) {
    each(x, [](vec<double> y) { return y * y; });
  }
  double total() const {
    return reduce_add(a + b);
  }

 private:
  template <typename F>
  OODK_INLINE void each(vec<T> x, F f) {
    if constexpr (std::is_same_v<T, double>) {
      a += f(x);
    } else {
#if defined(__AVX512F__)
      a += f(_mm512_cvtps_pd(_mm512_castps512_ps256(x)));
      b += f(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
#elif defined(__AVX2__)
      a += f(_mm256_cvtps_pd(_mm256_castps256_ps128(x)));
      b += f(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
#else
      typedef float half_t __attribute__((vector_size(kBytes / 2)));
      half_t halves[2];
      std::memcpy(halves, &x, sizeof(x));
      a += f(__builtin_convertvector(halves[0], vec<double>));
      b += f(__builtin_convertvector(halves[1], vec<double>));
#endif
    }
  }
};

struct Wanted {
  int64_t k, first; // the k-th largest is in the bin of ranks first, first + 1 ...
  double before; // sum of the values of the bins before
};

template <typename T>
class Ranking {
 public:
  explicit Ranking(int64_t width)
      : n_(width),
        bins_(bins_of(width)),
        values_(width + lanes<T>),
        above_(width + lanes<T>),
        order_(width + lanes<T>),
        bin_(width + lanes<T>),
        sums_(width / lanes<T> + 1),
        ends_(bins_) {}

  // Reads a row, rectified if so wanted.
  template <typename S>
  RowSums read(const S* row, bool rectified) {
    Adder<T> l1, square;
    const double sum =
        read(row, rectified ? T(0) : -std::numeric_limits<T>::infinity(), [&](vec<T> x) {
          l1.add_abs(x);
          square.add_square(x);
        });
    return {l1.total(), std::sqrt(square.total()), sum};
  }
  template <typename S>
  void read_plain(const S* row) {
    read(row, -std::numeric_limits<T>::infinity(), [](vec<T>) {});
  }

  bool nan() const {
    return nan_;
  }
  T low() const {
    return low_;
  }
  T high() const {
    return high_;
  }
  const T* values() const { // of the row, as read
    return values_;
  }

  // Makes ready for ranks up to `most`, 1 <= most <= width, of a row without NaN.
  void rank(int64_t most) {
    sorted_bin_ = -1;
    // A long tail is in the first bin, lest all others be in the last.
    top_ = low_ + 8 * (mean_ - low_);
    top_ = top_ < high_ ? top_ : high_;
    scale_ = T(bins_) / (top_ - low_);
    // Where there are few, and where halving and dividing fail: infinities and no range.
    sorted_ = n_ <= 32 || !(high_ - low_ <= std::numeric_limits<T>::max()) ||
        !(scale_ > 0 && scale_ <= std::numeric_limits<T>::max());
    if (sorted_) {
      count_ = n_;
      if (low_ == high_)
        count_ = 0;
      else
        std::memcpy(order_, values_, n_ * sizeof(T));
      sort_descending<T>(order_, count_);
    } else {
      deal(bound_of(most));
    }
    add_up();
  }

  // First for all k, then find() for each: sorting a bin changes what comes before another.
  Wanted want(int64_t k) const {
    if (k > count_)
      return {k, count_, sum_before(count_)};
    int64_t first = k - 1;
    if (!sorted_) {
      const int64_t bin = bin_of(order_[k - 1]);
      first = bin ? ends_[bin - 1] : 0;
    }
    return {k, first, sum_before(first)};
  }

  struct Found {
    T value; // the k-th largest
    double sum; // of the k largest
    int64_t greater; // how many are greater than the k-th largest
  };

  Found find(const Wanted& wanted) {
    const auto [k, first, before] = wanted;
    if (k > count_) // all others are the least
      return {low_, before + double(k - count_) * double(low_), count_};
    if (!sorted_ && first != sorted_bin_) {
      sort_descending<T>(&order_[first], ends_[bin_of(order_[k - 1])] - first);
      sorted_bin_ = first;
    }
    const T value = order_[k - 1];
    double sum = before;
    int64_t greater = k - 1;
    for (int64_t i = first; i < k; ++i)
      sum += double(order_[i]);
    while (greater > 0 && order_[greater - 1] == value)
      --greater;
    return {value, sum, greater};
  }

 private:
  // Sum of the row's values, none below `floor`; f is called with each vector, 0 where there is none.
  template <typename S, typename F>
  OODK_INLINE double read(const S* row, T least, const F& f) {
    constexpr int L = lanes<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    const vec<T> floor = splat(least);
    vec<T> low = splat(inf), high = splat(-inf);
    Adder<T> sum;
    T* const values = values_; // what is stored there changes no member
    const int64_t n = n_;
    const auto add = [&](int64_t i, vec<T> x) {
      store(values + i, x); // there is room after the last
      sum.add(x);
      f(x);
    };
    const auto bound = [&](vec<T> x) {
      low = x < low ? x : low;
      high = max(x, high);
    };
    int64_t i = 0;
    for (; i + L <= n; i += L) {
      const vec<T> x = max(floor, load(row + i)); // NaN stays
      add(i, x);
      bound(x);
    }
    if (const int left = int(n - i)) {
      add(i, max(floor, load_first(row + i, left, T(0))));
      bound(max(floor, load_first(row + i, left, widen(row[i]))));
    }
    low_ = -reduce_max(-low);
    high_ = reduce_max(high);
    const double total = sum.total();
    nan_ = false;
    mean_ = T(total / double(n_));
    if (total != total) // or infinities of both signs
      for (int64_t j = 0; j < n_; ++j)
        nan_ |= values_[j] != values_[j];
    return total;
  }

  static int64_t bins_of(int64_t width) {
    int64_t bins = 64;
    while (4 * bins < width && bins < 4096)
      bins *= 2;
    return bins;
  }

  int64_t bin_of(T x) const {
    const int64_t bin = x < top_ ? int64_t((top_ - x) * scale_) : 0;
    return bin < bins_ ? bin : bins_ - 1;
  }

  // What at least `most` values are greater than; or the least value.
  T bound_of(int64_t most) const {
    T bound = low_, above = high_;
    for (int step = 0; step < 4; ++step) {
      const T middle = bound + (above - bound) / 2;
      const int64_t greater = count_greater<T>(values_, n_, middle);
      if (greater < most)
        above = middle;
      else
        bound = middle;
      if (greater >= most && greater <= most + most / 2)
        break;
    }
    return bound;
  }

  void deal(T bound) {
    constexpr int L = lanes<T>;
    count_ = copy_greater<T>(values_, n_, bound, above_);
    const ivec<T> last = ivec<T>{} + int_t<T>(bins_ - 1);
    for (int64_t j = 0; j < count_; j += L) { // the last ones mean nothing
      const vec<T> place = max((top_ - load(&above_[j])) * scale_, vec<T>{});
      const ivec<T> bin = __builtin_convertvector(place, ivec<T>);
      const ivec<T> kept = bin < last ? bin : last;
      std::memcpy(&bin_[j], &kept, sizeof(kept));
    }
    std::memset(ends_, 0, bins_ * sizeof(int32_t));
    for (int64_t j = 0; j < count_; ++j)
      ++ends_[bin_[j]];
    int32_t before = 0;
    for (int64_t b = 0; b < bins_; ++b) {
      const int32_t size = ends_[b];
      ends_[b] = before;
      before += size;
    }
    for (int64_t j = 0; j < count_; ++j)
      order_[ends_[bin_[j]]++] = above_[j];
  }

  void add_up() {
    constexpr int L = lanes<T>;
    double sum = 0;
    int64_t b = 0;
    for (; (b + 1) * L <= count_; ++b) {
      sums_[b] = sum;
      Adder<T> block;
      block.add(load(&order_[b * L]));
      sum += block.total();
    }
    sums_[b] = sum;
  }

  double sum_before(int64_t rank) const {
    const int64_t block = rank / lanes<T>;
    double sum = sums_[block];
    for (int64_t i = block * lanes<T>; i < rank; ++i)
      sum += double(order_[i]);
    return sum;
  }

  int64_t n_, bins_;
  int64_t count_ = 0; // how many are ranked: all, but for some of the least
  int64_t sorted_bin_ = -1; // the first rank of the bin that was sorted last
  T low_ = 0, high_ = 0, mean_ = 0, top_ = 0, scale_ = 0;
  bool nan_ = false, sorted_ = false;
  VectorBuffer<T> values_, above_, order_;
  VectorBuffer<int_t<T>> bin_;
  VectorBuffer<double> sums_; // sums_[b]: of the first b vectors of order_
  VectorBuffer<int32_t> ends_; // of the bins, in order_
};

} // namespace
} // namespace OODK_CPU_NS
} // namespace oodk
