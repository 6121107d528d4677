// K-means: products of points with centroids, and what is done with them.
//
// The nearest centroid of x maximises x . c - |c|^2 / 2. A tile of rows meets a panel of centroids
// of two vectors' width: rows x 2 accumulators, one broadcast a row and feature, two loads a feature,
// so that the multiply-adders are the limit and not the loads. The argmax is taken lane by lane while
// the accumulators are still in registers; lanes meet once a row. N x K never exists in memory.
#include "cpu/kmeans/kernel.h"

#include "cpu/simd.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

#if defined(__AVX512F__)
constexpr int kTile = 14; // 28 accumulators, 2 columns, 1 broadcast of 32 registers
#else
constexpr int kTile = 6; // 12, 2 and 1 of 16
#endif

template <typename S>
OODK_INLINE const S* row_of(const PointRows& p, int64_t i) {
  return (const S*)p.x + (p.ids ? p.ids[i] : i) * p.stride;
}

// Row i's values from what is in memory, in two steps where its scale is more than a number holds.
// `kAsIs`: they are what is there.
template <typename T, bool kAsIs = false>
struct Placed {
  T boost, scale;
  const T* center;

  OODK_INLINE Placed(const PointRows& p, int64_t i) : center((const T*)p.center) {
    const T found = p.scale ? ((const T*)p.scale)[i] : T(1);
    boost = found < 0 ? kBoost<T> : T(1);
    scale = found < 0 ? -found : found;
  }
  template <typename V>
  OODK_INLINE V operator()(V x, V from_center) const {
    if constexpr (kAsIs)
      return x;
    else
      return x * boost * scale - from_center;
  }
};

template <typename S>
OODK_INLINE vec<acc_t<S>> load_upto(const S* from, int64_t n) {
  return n >= lanes<acc_t<S>> ? load(from) : load_first(from, int(n), acc_t<S>(0));
}

template <typename T>
OODK_INLINE T squared_norm(const T* row, int64_t d) {
  T sum{};
  for (int64_t j = 0; j < d; ++j)
    sum += row[j] * row[j];
  return sum;
}

// Calls f(S{}) where S is an element type that accumulates in T.
template <typename T, typename F>
OODK_INLINE void dispatch_as(const PointRows& p, F f) {
  dispatch(p.dtype, [&](auto s) {
    if constexpr (std::is_same_v<acc_t<decltype(s)>, T>)
      f(s);
  });
}

template <typename S, typename T = acc_t<S>>
OODK_INLINE T row_norm2(const S* x, int64_t d) {
  constexpr int L = lanes<T>;
  vec<T> sum[4] = {};
  int64_t j = 0;
  for (; j + 4 * L <= d; j += 4 * L)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      sum[v] += load(x + j + v * L) * load(x + j + v * L);
  for (; j < d; j += L) {
    const vec<T> value = load_upto(x + j, d - j);
    sum[0] += value * value;
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <typename T>
void scales(const PointRows& p, int64_t begin, int64_t end, bool normalize, T* scale) {
  constexpr T tiny = std::numeric_limits<T>::min() * T(1e16); // squares below may have been lost
  dispatch_as<T>(p, [&](auto s) {
    using S = decltype(s);
    for (int64_t i = begin; i < end; ++i) {
      const S* x = row_of<S>(p, i);
      long double norm2 = row_norm2(x, p.d);
      if (normalize && !(norm2 > tiny && std::isfinite(norm2))) {
        norm2 = 0;
        for (int64_t j = 0; j < p.d; ++j)
          norm2 += (long double)widen(x[j]) * widen(x[j]);
      }
      constexpr T most = std::numeric_limits<T>::max();
      if (!std::isfinite(norm2))
        scale[i] = std::numeric_limits<T>::quiet_NaN();
      else if (!normalize)
        scale[i] = T(norm2);
      else {
        const long double inverse = norm2 > 0 ? 1 / std::sqrt(norm2) : 1;
        scale[i] = inverse < most ? T(inverse) : -T(inverse / kBoost<T>);
      }
    }
  });
}

template <typename T>
void load_rows(const PointRows& p, int64_t begin, int64_t end, T* rows, int64_t stride) {
  dispatch_as<T>(p, [&](auto s) {
    using S = decltype(s);
    for (int64_t i = begin; i < end; ++i, rows += stride) {
      const S* x = row_of<S>(p, i);
      const Placed<T> placed(p, i);
      const T* center = placed.center;
      int64_t j = 0;
      for (; j + lanes<T> <= p.d; j += lanes<T>)
        store(rows + j, placed(load(x + j), center ? load(center + j) : vec<T>{}));
      for (; j < p.d; ++j)
        rows[j] = placed(widen(x[j]), center ? center[j] : T(0));
      for (; j < stride; ++j)
        rows[j] = 0;
    }
  });
}

template <typename T>
void pack(const T* rows, int64_t stride, int64_t count, int64_t d, T* packed) {
  constexpr int L = lanes<T>;
  const int64_t halves = (count + 2 * L - 1) / (2 * L) * 2;
  for (int64_t half = 0; half < halves; ++half) {
    T* to = packed + half / 2 * (2 * L) * d + half % 2 * L;
    const int64_t first = half * L;
    const int64_t n = count - first < L ? (count > first ? count - first : 0) : L;
    int64_t j = 0;
    if (n == L)
      for (; j + L <= d; j += L) {
        vec<T> tile[L];
        for (int r = 0; r < L; ++r)
          tile[r] = load(rows + (first + r) * stride + j);
        transpose<T>(tile);
        for (int c = 0; c < L; ++c)
          store(to + (j + c) * 2 * L, tile[c]);
      }
    for (; j < d; ++j)
      for (int r = 0; r < L; ++r)
        to[j * 2 * L + r] = r < n ? rows[(first + r) * stride + j] : T(0);
  }
}

template <typename T>
using Tile = vec<T>[kTile][2];

template <typename T>
OODK_INLINE void multiply(const T* x, int64_t stride, int64_t d, const T* panel, Tile<T>& sum) {
  for (int64_t j = 0; j < d; ++j) {
    const vec<T> b0 = load(panel + j * 2 * lanes<T>),
                 b1 = load(panel + j * 2 * lanes<T> + lanes<T>);
#pragma GCC unroll 14
    for (int r = 0; r < kTile; ++r) {
      const vec<T> a = splat(x[r * stride + j]);
      sum[r][0] += a * b0;
      sum[r][1] += a * b1;
    }
  }
}

template <typename T>
void product(const T* rows, int64_t stride, int64_t tiles, int64_t d, const T* packed,
    int64_t panels, T* out, int64_t out_stride) {
  constexpr int L = lanes<T>;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t t = 0; t < tiles; ++t) {
      Tile<T> sum{};
      multiply(rows + t * kTile * stride, stride, d, packed + p * 2 * L * d, sum);
#pragma GCC unroll 14
      for (int r = 0; r < kTile; ++r) {
        store(out + (t * kTile + r) * out_stride + p * 2 * L, sum[r][0]);
        store(out + (t * kTile + r) * out_stride + p * 2 * L + L, sum[r][1]);
      }
    }
}

template <typename T>
OODK_INLINE ivec<T> iota() {
  ivec<T> index;
  for (int i = 0; i < lanes<T>; ++i)
    index[i] = i;
  return index;
}

template <typename T>
void assign(const T* rows, int64_t stride, int64_t tiles, int64_t d, const T* packed, const T* bias,
    int64_t panels, int32_t* label, T* best) {
  constexpr int L = lanes<T>;
  // Of each row the best value so far, lane by lane, and the panel (doubled, plus the half) it is in.
  VectorBuffer<vec<T>> value(tiles * kTile);
  VectorBuffer<ivec<T>> where(tiles * kTile);
  for (int64_t i = 0; i < tiles * kTile; ++i) {
    value[i] = splat(-std::numeric_limits<T>::infinity());
    where[i] = ivec<T>{} - 1;
  }
  for (int64_t p = 0; p < panels; ++p) {
    const vec<T> bias0 = load(bias + p * 2 * L), bias1 = load(bias + p * 2 * L + L);
    for (int64_t t = 0; t < tiles; ++t) {
      Tile<T> sum;
#pragma GCC unroll 14
      for (int r = 0; r < kTile; ++r) {
        sum[r][0] = bias0;
        sum[r][1] = bias1;
      }
      multiply(rows + t * kTile * stride, stride, d, packed + p * 2 * L * d, sum);
      vec<T>* v = value + t * kTile;
      ivec<T>* w = where + t * kTile;
#pragma GCC unroll 14
      for (int r = 0; r < kTile; ++r) {
        const ivec<T> first = sum[r][0] > v[r];
        v[r] = first ? sum[r][0] : v[r];
        w[r] = first ? ivec<T>{} + int_t<T>(2 * p) : w[r];
        const ivec<T> second = sum[r][1] > v[r];
        v[r] = second ? sum[r][1] : v[r];
        w[r] = second ? ivec<T>{} + int_t<T>(2 * p + 1) : w[r];
      }
    }
  }
  for (int64_t i = 0; i < tiles * kTile; ++i) {
    T most = -std::numeric_limits<T>::infinity();
    int64_t column = -1;
    for (int l = 0; l < L; ++l) {
      const int64_t c = where[i][l] * L + l;
      if (where[i][l] >= 0 && (value[i][l] > most || (value[i][l] == most && c < column))) {
        most = value[i][l];
        column = c;
      }
    }
    label[i] = int32_t(column);
    best[i] = most;
  }
}

template <typename T>
void assign_products(const T* dots, int64_t stride, int64_t k, const T* factor, const T* bias,
    int64_t begin, int64_t end, int32_t* label) {
  constexpr int L = lanes<T>, n = KmeansKernels<T>::kBlock / L;
  for (int64_t i = begin; i < end; i += n * L) {
    vec<T> value[n];
    ivec<T> where[n];
#pragma GCC unroll 32
    for (int v = 0; v < n; ++v) {
      value[v] = splat(-std::numeric_limits<T>::infinity());
      where[v] = ivec<T>{} - 1;
    }
    for (int64_t c = 0; c < k; ++c) {
      const T* at = dots + c * stride + i;
      const vec<T> f = splat(factor[c]), b = splat(bias[c]);
      const ivec<T> index = ivec<T>{} + int_t<T>(c);
#pragma GCC unroll 32
      for (int v = 0; v < n; ++v) {
        const vec<T> score = load(at + v * L) * f + b;
        const ivec<T> better = score > value[v];
        value[v] = better ? score : value[v];
        where[v] = better ? index : where[v];
      }
    }
    for (int v = 0; v < n; ++v)
      for (int l = 0; l < L && i + v * L + l < end; ++l)
        label[i + v * L + l] = int32_t(where[v][l]);
  }
}

// Columns [column, column + V * lanes) of the sum of rows; V = 1 may be short of a whole vector.
template <typename S, int V, bool kAsIs, typename T = acc_t<S>>
OODK_INLINE void sum_columns(
    const PointRows& p, const int32_t* members, int64_t count, int64_t column, T* sum) {
  constexpr int L = lanes<T>;
  constexpr int64_t run = 64; // rows: float32 sums lose 6 bits at most
  const int64_t width = p.d - column;
  double total[V * L] = {};
  vec<T> part[V] = {}, center[V] = {};
  if (p.center)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      center[v] = load_upto((const T*)p.center + column + v * L, width - v * L);
  for (int64_t first = 0; first < count; first += run) {
    const int64_t last = count - first < run ? count : first + run;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      part[v] = vec<T>{};
    for (int64_t m = first; m < last; ++m) {
      const S* x = row_of<S>(p, members[m]) + column;
      const Placed<T, kAsIs> placed(p, members[m]);
      if constexpr (V == 1)
        part[0] += placed(load_upto(x, width), center[0]);
      else
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v)
          part[v] += placed(load(x + v * L), center[v]);
    }
    if (count > run)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        for (int l = 0; l < L; ++l)
          total[v * L + l] += part[v][l];
  }
  if (count > run)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      for (int l = 0; l < L; ++l)
        part[v][l] = T(total[v * L + l]);
  if (V == 1 && width < L)
    return store_first(sum, int(width), part[0]);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v)
    store(sum + v * L, part[v]);
}

template <bool kAsIs, typename T>
void sum_rows_of(const PointRows& p, const int32_t* members, int64_t count, T* sum) {
  constexpr int V = 8; // vectors: sums enough to hide the latency of an addition
  dispatch_as<T>(p, [&](auto s) {
    using S = decltype(s);
    int64_t column = 0;
    for (; column + V * lanes<T> <= p.d; column += V * lanes<T>)
      sum_columns<S, V, kAsIs>(p, members, count, column, sum + column);
    for (; column < p.d; column += lanes<T>)
      sum_columns<S, 1, kAsIs>(p, members, count, column, sum + column);
  });
}

template <typename T>
void sum_rows(const PointRows& p, const int32_t* members, int64_t count, T* sum) {
  p.scale || p.center ? sum_rows_of<false>(p, members, count, sum)
                      : sum_rows_of<true>(p, members, count, sum);
}

template <bool kAsIs, typename T>
void distances_of(const PointRows& p, int64_t begin, int64_t end, const int32_t* label,
    const T* centroids, int64_t stride, T* distance) {
  constexpr int L = lanes<T>;
  dispatch_as<T>(p, [&](auto s) {
    using S = decltype(s);
    for (int64_t i = begin; i < end; ++i) {
      if (label[i] < 0) {
        distance[i] = 0;
        continue;
      }
      const S* x = row_of<S>(p, i);
      const T* c = centroids + label[i] * stride;
      const Placed<T, kAsIs> placed(p, i);
      const T* center = placed.center;
      const auto center_at = [&](int64_t j) {
        return center ? load_upto(center + j, p.d - j) : vec<T>{};
      };
      vec<T> sum[4] = {};
      int64_t j = 0;
      for (; j + 4 * L <= p.d; j += 4 * L)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const int64_t at = j + v * L;
          const vec<T> difference = placed(load(x + at), center_at(at)) - load(c + at);
          sum[v] += difference * difference;
        }
      for (; j < p.d; j += L) {
        const vec<T> difference =
            placed(load_upto(x + j, p.d - j), center_at(j)) - load_upto(c + j, p.d - j);
        sum[0] += difference * difference;
      }
      distance[i] = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  });
}

template <typename T>
void distances(const PointRows& p, int64_t begin, int64_t end, const int32_t* label,
    const T* centroids, int64_t stride, T* distance) {
  p.scale || p.center ? distances_of<false>(p, begin, end, label, centroids, stride, distance)
                      : distances_of<true>(p, begin, end, label, centroids, stride, distance);
}

// min(d2, squared distance to the candidate) of `lanes` points.
template <typename T>
OODK_INLINE vec<T> closer(const T* dots, vec<T> norm2_c, const T* norm2, const T* d2) {
  const vec<T> distance = load(norm2) + norm2_c - load(dots) * T(2);
  const vec<T> positive = distance > vec<T>{} ? distance : vec<T>{};
  return positive < load(d2) ? positive : load(d2);
}

template <typename T>
struct Wide {
  typedef double type __attribute__((vector_size(lanes<T> * 8)));
};

template <typename T>
OODK_INLINE double sum_lanes(const typename Wide<T>::type& v) {
  double sum = 0;
  for (int l = 0; l < lanes<T>; ++l)
    sum += v[l];
  return sum;
}

template <typename T>
double potential(
    const T* dots, T norm2_c, const T* norm2, const T* d2, int64_t begin, int64_t end) {
  using wide_t = typename Wide<T>::type;
  constexpr int64_t block = KmeansKernels<T>::kBlock;
  wide_t sum{};
  for (int64_t i = begin; i < end; i += block) {
    vec<T> part{};
#pragma GCC unroll 16
    for (int64_t j = i; j < i + block; j += lanes<T>)
      part += closer<T>(dots + j, splat(norm2_c), norm2 + j, d2 + j);
    sum += __builtin_convertvector(part, wide_t);
  }
  return sum_lanes<T>(sum);
}

template <typename T>
void absorb(const T* dots, T norm2_c, const T* norm2, T* d2, int64_t begin, int64_t end,
    double* block_sums) {
  using wide_t = typename Wide<T>::type;
  constexpr int64_t block = KmeansKernels<T>::kBlock;
  for (int64_t i = begin; i < end; i += block) {
    vec<T> part{};
#pragma GCC unroll 16
    for (int64_t j = i; j < i + block; j += lanes<T>) {
      const vec<T> now = closer<T>(dots + j, splat(norm2_c), norm2 + j, d2 + j);
      store(d2 + j, now);
      part += now;
    }
    block_sums[i / block] = sum_lanes<T>(__builtin_convertvector(part, wide_t));
  }
}

template <typename T>
constexpr KmeansKernels<T> kTable = {kTile, 2 * lanes<T>, scales<T>, load_rows<T>, squared_norm<T>,
    pack<T>, product<T>, assign<T>, assign_products<T>, sum_rows<T>, distances<T>, potential<T>,
    absorb<T>};

} // namespace

extern const KmeansKernels<float> kmeans_kernels_float = kTable<float>;
extern const KmeansKernels<double> kmeans_kernels_double = kTable<double>;

} // namespace OODK_CPU_NS
} // namespace oodk
