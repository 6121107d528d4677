// Vectors as wide as the instruction set this file is compiled for. Everything is in an unnamed
// namespace: the same source is compiled once per instruction set, and the linker must never take
// one build's inline function for another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#define OODK_INLINE inline __attribute__((always_inline))

namespace oodk {
namespace OODK_CPU_NS {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
struct Int;
template <>
struct Int<float> {
  using type = int32_t;
};
template <>
struct Int<double> {
  using type = int64_t;
};
template <typename T>
using int_t = typename Int<T>::type;

template <typename T>
struct Simd {
  typedef T type __attribute__((vector_size(kBytes)));
  typedef int_t<T> mask __attribute__((vector_size(kBytes))); // all ones where true
  typedef std::make_unsigned_t<int_t<T>> bits __attribute__((vector_size(kBytes)));
};
template <typename T>
using vec = typename Simd<T>::type; // T = float or double
template <typename T>
using ivec = typename Simd<T>::mask;
template <typename T>
using uvec = typename Simd<T>::bits; // may overflow

template <typename T>
constexpr int lanes = kBytes / int(sizeof(T));

template <typename To, typename From>
OODK_INLINE To bitcast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
OODK_INLINE vec<T> splat(T value) {
  return value - vec<T>{};
}

// --- element types: what is read is float64 or float32, or becomes float32 ----------------------

template <typename S>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename S>
using acc_t = typename Accumulate<S>::type;

OODK_INLINE float widen(BFloat16 value) {
  return bitcast<float>(uint32_t(value.bits) << 16);
}

OODK_INLINE float widen(Half value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  // The exponent is moved by a multiplication, which is right for subnormals too.
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const bool special = magnitude >= 0x0f800000; // inf or NaN
  const float number = bitcast<float>(magnitude) * 0x1p112f;
  return bitcast<float>((special ? magnitude | 0x7f800000 : bitcast<uint32_t>(number)) | sign);
#endif
}

OODK_INLINE float widen(float value) {
  return value;
}
OODK_INLINE double widen(double value) {
  return value;
}

OODK_INLINE void narrow(float value, BFloat16* to) { // round to nearest even
  const uint32_t bits = bitcast<uint32_t>(value);
  to->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

OODK_INLINE void narrow(float value, Half* to) {
#if defined(__F16C__)
  to->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = bitcast<uint32_t>(value), sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00; // NaN
  else if (magnitude >= 0x477ff000)
    half = 0x7c00; // rounds to inf
  else if (magnitude < 0x38800000) // subnormal: the addition rounds at the right bit
    half = bitcast<uint32_t>(bitcast<float>(magnitude) + 0.5f) - 0x3f000000;
  else
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  to->bits = uint16_t(half | sign);
#endif
}

OODK_INLINE void narrow(float value, float* to) {
  *to = value;
}
OODK_INLINE void narrow(double value, double* to) {
  *to = value;
}

template <typename S>
OODK_INLINE vec<acc_t<S>> load(const S* from) {
  using T = acc_t<S>;
  vec<T> value;
  if constexpr (sizeof(S) == sizeof(T)) {
    std::memcpy(&value, from, sizeof(value));
    return value;
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    typedef uint16_t packed_t __attribute__((vector_size(kBytes / 2)));
    typedef uint32_t wide_t __attribute__((vector_size(kBytes)));
    packed_t packed;
    std::memcpy(&packed, from, sizeof(packed));
    return (vec<T>)(__builtin_convertvector(packed, wide_t) << 16);
  } else {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    for (int i = 0; i < lanes<T>; ++i)
      value[i] = widen(from[i]);
    return value;
#endif
  }
}

template <typename S>
OODK_INLINE void store(S* to, vec<acc_t<S>> value) {
  using T = acc_t<S>;
  if constexpr (sizeof(S) == sizeof(T)) {
    std::memcpy(to, &value, sizeof(value));
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    typedef uint16_t packed_t __attribute__((vector_size(kBytes / 2)));
    typedef uint32_t wide_t __attribute__((vector_size(kBytes)));
    const wide_t bits = (wide_t)value;
    const wide_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const wide_t nan = (wide_t)(value != value);
    const packed_t packed = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), packed_t);
    std::memcpy(to, &packed, sizeof(packed));
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < lanes<T>; ++i)
      narrow(value[i], to + i);
#endif
  }
}

// 2 * lanes adjacent values, in an order that bfloat16 makes its own: two operations less.
template <typename S>
OODK_INLINE void load_two(const S* from, vec<acc_t<S>>& a, vec<acc_t<S>>& b) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    typedef uint32_t pairs_t __attribute__((vector_size(kBytes)));
    pairs_t pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    a = (vec<float>)(pairs << 16);
    b = (vec<float>)(pairs & 0xffff0000);
  } else {
    a = load(from);
    b = load(from + lanes<acc_t<S>>);
  }
}

// All ones in the first n <= lanes lanes.
template <typename T>
OODK_INLINE ivec<T> first_lanes(int n) {
  struct Window {
    int_t<T> mask[2 * lanes<T>];
    constexpr Window() : mask() {
      for (int i = 0; i < lanes<T>; ++i)
        mask[i] = -1;
    }
  };
  static constexpr Window window;
  ivec<T> mask;
  std::memcpy(&mask, window.mask + lanes<T> - n, sizeof(mask));
  return mask;
}

// The first n <= lanes values; the other lanes hold `fill`.
template <typename S>
OODK_INLINE vec<acc_t<S>> load_first(const S* from, int n, acc_t<S> fill) {
  using T = acc_t<S>;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>)
    return _mm512_mask_loadu_ps(splat(fill), __mmask16((1u << n) - 1), from);
  if constexpr (std::is_same_v<S, double>)
    return _mm512_mask_loadu_pd(splat(fill), __mmask8((1u << n) - 1), from);
  if constexpr (sizeof(S) == 2) {
    const __mmask16 kept = __mmask16((1u << n) - 1);
    const __m256i some = _mm256_maskz_loadu_epi16(kept, from);
    if constexpr (std::is_same_v<S, Half>)
      return _mm512_mask_cvtph_ps(splat(fill), kept, some);
    else
      return _mm512_castsi512_ps(_mm512_mask_slli_epi32(
          _mm512_castps_si512(splat(fill)), kept, _mm512_cvtepu16_epi32(some), 16));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<S, float>) {
    const ivec<T> kept = first_lanes<T>(n);
    return kept ? (vec<T>)_mm256_maskload_ps(from, (__m256i)kept) : splat(fill);
  }
#endif
  vec<T> value = splat(fill);
  for (int i = 0; i < n; ++i)
    value[i] = widen(from[i]);
  return value;
}

// The values [i, n) of n >= lanes adjacent ones, fewer than a vector; the other lanes hold `fill`.
// Where there are no masks it overlaps the vector before.
template <typename S>
OODK_INLINE vec<acc_t<S>> load_last(const S* from, int64_t i, int64_t n, acc_t<S> fill) {
#if defined(__AVX512F__)
  return load_first(from + i, int(n - i), fill);
#else
  using T = acc_t<S>;
  return first_lanes<T>(lanes<T> - int(n - i)) ? splat(fill) : load(from + n - lanes<T>);
#endif
}

template <typename S>
OODK_INLINE void store_first(S* to, int n, vec<acc_t<S>> value) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(to, __mmask16((1u << n) - 1), value);
    return;
  }
#endif
  S full[lanes<acc_t<S>>];
  store(full, value);
  std::memcpy(to, full, n * sizeof(S));
}

// --- arithmetic ---------------------------------------------------------------------------------

// The second operand where either is NaN.
OODK_INLINE vec<float> max(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
OODK_INLINE vec<double> max(vec<double> a, vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_max_pd(a, b);
#elif defined(__AVX2__)
  return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

OODK_INLINE vec<float> min(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
OODK_INLINE vec<double> min(vec<double> a, vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_min_pd(a, b);
#elif defined(__AVX2__)
  return _mm256_min_pd(a, b);
#else
  return a < b ? a : b;
#endif
}

// Halves meet: log2(lanes) steps in a fixed order, so the same bits on every call.
template <typename T, typename F>
OODK_INLINE T reduce(vec<T> value, F combine) {
  T lane[lanes<T>];
  std::memcpy(lane, &value, sizeof(value));
#pragma GCC unroll 8
  for (int half = lanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      lane[i] = combine(lane[i], lane[i + half]);
  return lane[0];
}
OODK_INLINE float reduce_max(vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  return reduce<float>(v, [](float a, float b) { return a > b ? a : b; });
#endif
}
OODK_INLINE double reduce_max(vec<double> v) {
  return reduce<double>(v, [](double a, double b) { return a > b ? a : b; });
}
OODK_INLINE float reduce_add(vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  return reduce<float>(v, [](float a, float b) { return a + b; });
#endif
}
OODK_INLINE double reduce_add(vec<double> v) {
  return reduce<double>(v, [](double a, double b) { return a + b; });
}

// e^x for x <= 0 (or NaN, which stays NaN); 0 below the smallest normal number. Within 2 ulp:
// x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial in r.
OODK_INLINE vec<float> exp(vec<float> x) {
  const vec<float> shifter = splat(0x1.8p23f);
  const vec<float> t = x * 1.44269504f + shifter;
  const vec<float> n = t - shifter;
  vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec<float> p = splat(1.381454e-3f);
  p = p * r + 8.368745e-3f;
  p = p * r + 4.166839e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask(x, splat(-87.33654f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(kept, p, n);
#else
  const uvec<float> bits = (uvec<float>)t << 23; // the low bits of t are n
  const vec<float> scale = (vec<float>)(bits + (127u << 23));
  return x < -87.33654f ? vec<float>{} : p * scale;
#endif
}

// What x is raised to for exp_term.
template <typename T>
constexpr T kLeast = std::is_same_v<T, float> ? T(-87.33654) : T(-708.39641853226408);

// e^x for kLeast <= x <= 88 (709 in double precision), or NaN, which stays NaN. To a relative error
// of 2e-7 + 2e-8 |x|, for sums: fewer operations than exp.
OODK_INLINE vec<float> exp_normal(vec<float> x) {
  const vec<float> shifter = splat(0x1.8p23f);
  const vec<float> t = x * 1.44269504f + shifter;
  const vec<float> n = t - shifter;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const vec<float> r = x * 1.44269504f - n; // 2^x: n + r, |r| <= 1/2
  vec<float> p = splat(0x1.5bba14p-10f);
  p = p * r + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.0f;
#else
  vec<float> r = x - n * 0.693359375f; // what x * log2 e is rounded to would be lost
  r = r + n * 2.12194440e-4f;
  vec<float> p = splat(1.381454e-3f);
  p = p * r + 8.368745e-3f;
  p = p * r + 4.166839e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#endif
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  const uvec<float> bits = (uvec<float>)t << 23; // the low bits of t are n
  return p * (vec<float>)(bits + (127u << 23));
#endif
}

OODK_INLINE vec<double> exp_normal(vec<double> x) {
  const vec<double> shifter = splat(0x1.8p52);
  const vec<double> t = x * 1.4426950408889634 + shifter;
  const vec<double> n = t - shifter;
  vec<double> r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  vec<double> p = splat(1.0 / 6227020800.0); // 1 / 13!
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const uvec<double> bits = (uvec<double>)t << 52;
  return p * (vec<double>)(bits + (uint64_t(1023) << 52));
}

OODK_INLINE vec<double> exp(vec<double> x) { // as exp of float
  return x < kLeast<double> ? vec<double>{} : exp_normal(x);
}

// A term of a sum: e^x as exp_normal has it; below that range the smallest normal number; above it
// at least 2^126, or not finite; NaN where x is.
OODK_INLINE vec<float> exp_term(vec<float> x) {
  x = max(splat(kLeast<float>), x);
#if !defined(__AVX512F__) // there the last operation overflows as it should
  x = min(splat(88.0f), x);
#endif
  return exp_normal(x);
}
OODK_INLINE vec<double> exp_term(vec<double> x) {
  return exp_normal(min(splat(709.0), max(splat(kLeast<double>), x)));
}

// log x for x = 0 (-inf), x >= the smallest normal number, or NaN (NaN). Within 2 ulp: x = 2^e m
// with m near 1, and a polynomial in m - 1 (Cephes).
OODK_INLINE vec<float> log(vec<float> x) {
  const ivec<float> bits = (ivec<float>)x;
  const vec<float> half = (vec<float>)((bits & 0x007fffff) | 0x3f000000); // in [1/2, 1)
  const ivec<float> low = half < 0.707106781f;
  const vec<float> e = __builtin_convertvector((bits >> 23) - 126 + low, vec<float>);
  const vec<float> m = (low ? half + half : half) - 1.0f;
  vec<float> p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const vec<float> z = m * m;
  const vec<float> tail = p * m * z - e * 2.12194440e-4f - 0.5f * z;
  const vec<float> value = m + tail + e * 0.693359375f;
  const float inf = std::numeric_limits<float>::infinity();
  return x > 0.0f && x < inf ? value : (x == 0.0f ? splat(-inf) : x);
}

OODK_INLINE vec<double> log(vec<double> x) { // once a group: the library's will do
  for (int i = 0; i < lanes<double>; ++i)
    x[i] = std::log(x[i]);
  return x;
}

// --- rows as lanes ------------------------------------------------------------------------------

template <typename V, int... I>
OODK_INLINE V interleave_low(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % 2 ? n + I / 2 : I / 2)...);
}
template <typename V, int... I>
OODK_INLINE V interleave_high(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (n / 2 + (I % 2 ? n + I / 2 : I / 2))...);
}

// Transposes in place: after log2(lanes) perfect shuffles column j is in m[j].
template <typename T>
OODK_INLINE void transpose(vec<T>* m) {
  constexpr int n = lanes<T>;
  constexpr auto all = std::make_integer_sequence<int, n>{};
  vec<T> other[n];
#pragma GCC unroll 8
  for (int step = 1; step < n; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      other[2 * i] = interleave_low(m[i], m[i + n / 2], all);
      other[2 * i + 1] = interleave_high(m[i], m[i + n / 2], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      m[i] = other[i];
  }
}

// Combines all lanes of each of `lanes` vectors: lane r of the result is of vector r, in the same
// order of operations for each. Overwrites them.
template <typename T, typename F>
OODK_INLINE vec<T> reduce_each(vec<T>* m, F combine) {
  constexpr auto all = std::make_integer_sequence<int, lanes<T>>{};
#pragma GCC unroll 8
  for (int half = lanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      m[i] =
          combine(interleave_low(m[i], m[i + half], all), interleave_high(m[i], m[i + half], all));
  return m[0];
}

// Columns [begin, end) of `lanes` rows, each column a vector whose lanes are the rows. Reads
// nothing outside the rows' `width` columns.
template <typename S>
OODK_INLINE void load_columns(
    const S* const* rows, int64_t width, int64_t begin, int64_t end, vec<acc_t<S>>* columns) {
  using T = acc_t<S>;
  constexpr int n = lanes<T>;
  vec<T> tile[n];
  for (int64_t c = begin; c < end; c += n) {
    // The last tile is moved left to end with the row, and overlaps the one before.
    const int64_t from = c + n <= width ? c : width - n;
    if (from < 0) {
      for (int64_t j = c; j < end; ++j)
        for (int r = 0; r < n; ++r)
          columns[j - begin][r] = widen(rows[r][j]);
      return;
    }
#pragma GCC unroll 16
    for (int r = 0; r < n; ++r)
      tile[r] = load(rows[r] + from);
    transpose<T>(tile);
    const int64_t stop = c + n < end ? c + n : end;
    for (int64_t j = c; j < stop; ++j)
      columns[j - begin] = tile[j - from];
  }
}

// The largest of n >= lanes adjacent values; any of them where one is NaN.
template <typename S, typename T = acc_t<S>>
OODK_INLINE T max_of(const S* z, int64_t n) {
  constexpr int L = lanes<T>;
  vec<T> m0 = load(z + n - L), m1 = m0;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    m0 = max(load(z + i), m0);
    m1 = max(load(z + i + L), m1);
  }
  if (i + L <= n)
    m0 = max(load(z + i), m0);
  return reduce_max(max(m0, m1));
}

// Whether any lane is set.
template <typename T>
OODK_INLINE bool any(ivec<T> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  int_t<T> set = 0;
  for (int j = 0; j < lanes<T>; ++j)
    set |= mask[j];
  return set != 0;
#endif
}

// First of n adjacent values that equals `value`; 0 where none does (NaN).
template <typename S, typename T = acc_t<S>>
int64_t find_first(const S* z, int64_t n, T value) {
  constexpr int L = lanes<T>;
  int64_t i = 0;
  while (i + L <= n && !any<T>(load(z + i) == value))
    i += L;
  for (; i < n; ++i)
    if (widen(z[i]) == value)
      return i;
  return 0;
}

// Calls f(S{}) with the element type that dtype names.
template <typename F>
OODK_INLINE void dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Half{});
  }
}

// Uninitialised values of one call, aligned for vectors. Throws std::bad_alloc, as Buffer does, which
// is no use here: inline, it would be one instruction set's for all.
template <typename T>
class VectorBuffer {
 public:
  explicit VectorBuffer(int64_t n) : data_((T*)operator new[](size_t(n) * sizeof(T), kAlign)) {}
  ~VectorBuffer() {
    operator delete[](data_, kAlign);
  }
  VectorBuffer(const VectorBuffer&) = delete;
  VectorBuffer& operator=(const VectorBuffer&) = delete;
  operator T*() const {
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* data_;
};

} // namespace
} // namespace OODK_CPU_NS
} // namespace oodk
