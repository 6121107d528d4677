// logsumexp of scale (z - b) + b of a row under several scales, from one read of it.
//
// Under a large scale few classes count. With u = z - b, its maximum m and B the range of the biases,
// y = scale u + b of a class is at most B - scale (m - u) above that of the largest u, so that all
// classes below m - (T + B) / scale together, with e^-T = unit / C, change no sum. From the least
// scale to the largest what is left of the row is narrowed, in its order, so that what a scale finds
// does not depend on the others.
#include "cpu/energy_kernel.h"

#include "cpu/simd.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

// Of pairs (u, b) those whose u is not below `bound`, in their order, to (to_u, to_b), which may be
// (u, b) and have room for n and a vector more; b and to_b may be null. NaN is kept.
template <typename T>
int64_t narrowed(const T* u, const T* b, int64_t n, T bound, T* to_u, T* to_b) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    for (constexpr int L = lanes<T>; i + L <= n; i += L) {
      const __m512 some = load(u + i);
      const __mmask16 kept = _mm512_cmp_ps_mask(some, splat(bound), _CMP_NLT_UQ);
      if (!kept)
        continue;
      if (b)
        store(to_b + count, (vec<T>)_mm512_maskz_compress_ps(kept, load(b + i)));
      store(to_u + count, (vec<T>)_mm512_maskz_compress_ps(kept, some));
      count += __builtin_popcount(kept);
    }
#endif
  for (; i < n; ++i) {
    const T value = u[i];
    if (b)
      to_b[count] = b[i];
    to_u[count] = value;
    count += !(value < bound);
  }
  return count;
}

// Of scale u + b, n >= 1 values. y: room for them and a vector more.
template <typename T>
T energy_of(const T* u, const T* b, int64_t n, T scale, T* y) {
  constexpr int L = lanes<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  vec<T> most = splat(-inf);
  for (int64_t i = 0; i < n; i += L) {
    vec<T> v = load(u + i) * splat(scale); // there is room beyond the last
    if (b)
      v += load(b + i);
    if (n - i < L)
      for (int j = int(n - i); j < L; ++j)
        v[j] = -inf;
    store(y + i, v);
    most = max(v, most); // but for NaN
  }
  const T m = reduce_max(most);
  vec<T> sum{};
  for (int64_t i = 0; i < n; i += L)
    sum += exp(load(y + i) - splat(m));
  const T s = reduce_add(sum);
  if (s == s)
    return m + std::log(s);
  for (int64_t i = 0; i < n; ++i) // m is infinite, or something is NaN
    if (y[i] != y[i])
      return y[i];
  return m;
}

template <typename S>
class Row {
 public:
  using T = acc_t<S>;

  Row(int64_t width, int64_t count, const T* bias)
      : n_(width),
        bias_(bias),
        u_(width + lanes<T>),
        b_(width + lanes<T>),
        y_(width + lanes<T>),
        order_(count) {
    constexpr T inf = std::numeric_limits<T>::infinity();
    T low = inf, high = -inf;
    for (int64_t i = 0; bias && i < width; ++i) {
      low = bias[i] < low ? bias[i] : low;
      high = bias[i] > high ? bias[i] : high;
    }
    margin_ = T(std::log(double(width))) - std::log(std::numeric_limits<T>::epsilon() / 2) +
        (bias ? high - low : T(0));
  }

  void energies(const S* z, const T* scale, int64_t count, T* energy) {
    read(z);
    const auto narrows = [](T s) { return s > 0 && s <= std::numeric_limits<T>::max(); };
    const auto key = [&](int64_t p) { return narrows(scale[p]) ? scale[p] : T(0); };
    for (int64_t p = 0; p < count; ++p) { // those first that the whole row counts for
      int64_t at = p;
      for (; at > 0 && key(order_[at - 1]) > key(p); --at)
        order_[at] = order_[at - 1];
      order_[at] = p;
    }
    int64_t n = n_;
    for (int64_t i = 0; i < count; ++i) {
      const T s = scale[order_[i]], bound = most_ - margin_ / s;
      if (narrows(s) && bound > least_) {
        n = narrowed<T>(u_, bias_ ? (const T*)b_ : nullptr, n, bound, u_, bias_ ? (T*)b_ : nullptr);
        least_ = bound;
      }
      energy[order_[i]] = energy_of<T>(u_, bias_ ? (const T*)b_ : nullptr, n, s, y_);
    }
  }

 private:
  void read(const S* z) {
    constexpr int L = lanes<T>;
    constexpr T inf = std::numeric_limits<T>::infinity();
    vec<T> high = splat(-inf), low = splat(inf);
    for (int64_t i = 0; i < n_; i += L) {
      const int left = int(n_ - i < L ? n_ - i : L);
      vec<T> x = left == L ? load(z + i) : load_first(z + i, left, widen(z[i]));
      if (bias_) {
        const vec<T> b = left == L ? load(bias_ + i) : load_first(bias_ + i, left, bias_[i]);
        x -= b;
        store(&b_[i], b);
      }
      store(&u_[i], x);
      high = max(x, high);
      low = x < low ? x : low;
    }
    most_ = reduce_max(high);
    least_ = -reduce_max(-low);
  }

  int64_t n_;
  const T* bias_;
  T margin_, most_ = 0, least_ = 0; // least_: all that is left is at least that, or NaN
  VectorBuffer<T> u_, b_, y_;
  VectorBuffer<int64_t> order_;
};

void energies(const void* logits, DType dtype, int64_t width, int64_t stride, const void* scale,
    int64_t count, const void* bias, int64_t begin, int64_t end, void* energy) {
  dispatch(dtype, [&](auto tag) {
    using S = decltype(tag);
    using T = acc_t<S>;
    Row<S> row(width, count, (const T*)bias);
    for (int64_t r = begin; r < end; ++r)
      row.energies((const S*)logits + r * stride, (const T*)scale + r * count, count,
          (T*)energy + r * count);
  });
}

} // namespace

extern const EnergyKernels energy_kernels = {energies};

} // namespace OODK_CPU_NS
} // namespace oodk
