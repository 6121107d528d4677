// Inner products and distances of rows and the rows of a table that they name: both are read once,
// and all is added up in float64, where no product of float32 is rounded.
#include "cpu/distances_kernel.h"

#include "cpu/simd.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

// f(part, x, t) of the vectors of doubles that two vectors make.
template <typename T, typename F>
OODK_INLINE void each_part(vec<T> x, vec<T> t, const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(0, x, t);
  } else {
    typedef float half_t __attribute__((vector_size(kBytes / 2)));
    half_t a[2], b[2];
    std::memcpy(a, &x, sizeof(x));
    std::memcpy(b, &t, sizeof(t));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      f(i, __builtin_convertvector(a[i], vec<double>), __builtin_convertvector(b[i], vec<double>));
  }
}

struct Sums {
  double inner, l1, square;
};

template <typename S, typename T = acc_t<S>>
OODK_INLINE Sums sums_of(const S* x, const T* t, int64_t n) {
  constexpr int L = lanes<T>;
  vec<double> inner[2] = {}, l1[2] = {}, square[2] = {};
  const auto add = [&](int part, vec<double> a, vec<double> b) {
    const vec<double> d = a - b;
    inner[part] += a * b;
    l1[part] += (vec<double>)((uvec<double>)d << 1 >> 1); // |d|
    square[part] += d * d;
  };
  int64_t i = 0;
  for (; i + L <= n; i += L)
    each_part<T>(load(x + i), load(t + i), add);
  if (const int left = int(n - i))
    each_part<T>(load_first(x + i, left, T(0)), load_first(t + i, left, T(0)), add);
  return {reduce_add(inner[0] + inner[1]), reduce_add(l1[0] + l1[1]),
      reduce_add(square[0] + square[1])};
}

void distances(const void* x, DType dtype, int64_t width, int64_t stride, const void* table,
    int64_t table_stride, const int64_t* index, int64_t count, int64_t begin, int64_t end,
    void* inner, void* l1, void* l2) {
  dispatch(dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = acc_t<S>;
    for (int64_t i = begin * count; i < end * count; ++i) {
      const S* const row = (const S*)x + i / count * stride;
      const Sums sums = sums_of<S>(row, (const T*)table + index[i] * table_stride, width);
      ((T*)inner)[i] = T(sums.inner);
      ((T*)l1)[i] = T(sums.l1);
      ((T*)l2)[i] = T(std::sqrt(sums.square));
    }
  });
}

} // namespace

extern const DistanceKernels distance_kernels = {distances};

} // namespace OODK_CPU_NS
} // namespace oodk
