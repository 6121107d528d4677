// Products of queries with a bank, of which only those are kept that may belong to a neighbour.
//
// A tile of queries meets a panel of bank rows of two vectors' width: rows x 2 accumulators, one
// broadcast a row and feature, two loads a feature, so that the multiply-adders are the limit. Both
// are packed feature by feature: two streams of adjacent values. The sums are compared with the
// floors of their rows while they are still in registers.
#include "cpu/neighbors_kernel.h"

#include "cpu/simd.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

#if defined(__AVX512F__)
constexpr int kTile = 14; // 28 accumulators, 2 columns, 1 broadcast of 32 registers
#else
constexpr int kTile = 6; // 12, 2 and 1 of 16
#endif

template <typename T>
void pack(const T* rows, int64_t stride, int64_t count, int64_t d, T* tiles) {
  for (int64_t first = 0; first < count; first += kTile, tiles += d * kTile)
    for (int r = 0; r < kTile; ++r) {
      const T* row = rows + (first + r) * stride;
      for (int64_t j = 0; j < d; ++j)
        tiles[j * kTile + r] = first + r < count ? row[j] : T(0);
    }
}

// The sum of term(j) over the vectors of a loaded row.
template <typename T, typename F>
OODK_INLINE T sum_of(int64_t stride, const F& term) {
  constexpr int L = lanes<T>;
  vec<T> sum[4] = {};
  int64_t j = 0;
  for (; j + 4 * L <= stride; j += 4 * L)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const vec<T> x = term(j + v * L);
      sum[v] += x * x;
    }
  for (; j < stride; j += L) {
    const vec<T> x = term(j);
    sum[0] += x * x;
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <typename T>
void norms(const T* rows, int64_t stride, int64_t count, T* norm2) {
  for (int64_t i = 0; i < count; ++i)
    norm2[i] = sum_of<T>(stride, [&](int64_t j) { return load(rows + i * stride + j); });
}

template <typename T>
T distance(const T* a, const T* b, int64_t stride) {
  return sum_of<T>(stride, [&](int64_t j) { return load(a + j) - load(b + j); });
}

template <typename T>
int64_t scan(const T* tile, int64_t d, const T* columns, const T* bias, int64_t panels,
    const T* floor, int32_t* found) {
  constexpr int L = lanes<T>;
  int64_t count = 0;
  for (int64_t p = 0; p < panels; ++p) {
    vec<T> sum[kTile][2];
    const vec<T> bias0 = load(bias + p * 2 * L), bias1 = load(bias + p * 2 * L + L);
#pragma GCC unroll 14
    for (int r = 0; r < kTile; ++r) {
      sum[r][0] = bias0;
      sum[r][1] = bias1;
    }
    const T* panel = columns + p * 2 * L * d;
    for (int64_t j = 0; j < d; ++j) {
      const vec<T> b0 = load(panel + j * 2 * L), b1 = load(panel + j * 2 * L + L);
#pragma GCC unroll 14
      for (int r = 0; r < kTile; ++r) {
        const vec<T> a = splat(tile[j * kTile + r]);
        sum[r][0] += a * b0;
        sum[r][1] += a * b1;
      }
    }
#pragma GCC unroll 14
    for (int r = 0; r < kTile; ++r) {
      const ivec<T> below0 = sum[r][0] < floor[r], below1 = sum[r][1] < floor[r];
      if (any<T>(~(below0 & below1))) [[unlikely]] {
        T value[2 * L];
        store(value, sum[r][0]);
        store(value + L, sum[r][1]);
        for (int c = 0; c < 2 * L; ++c)
          if (!(value[c] < floor[r]))
            found[count++] = int32_t((p * 2 * L + c) * NeighborKernels<T>::kMostRows + r);
      }
    }
  }
  return count;
}

template <typename T>
constexpr NeighborKernels<T> kTable = {kTile, pack<T>, norms<T>, scan<T>, distance<T>};

} // namespace

extern const NeighborKernels<float> neighbor_kernels_float = kTable<float>;
extern const NeighborKernels<double> neighbor_kernels_double = kTable<double>;

} // namespace OODK_CPU_NS
} // namespace oodk
