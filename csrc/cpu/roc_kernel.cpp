// CPU kernels of the ROC ops, see roc_kernel.h.
//
// Sort: least-significant-digit radix sort of order-preserving keys. A score of w bytes is read as
// a signed integer; where it is negative, all bits but the sign are flipped, which makes integers
// order as scores do; -0.0 becomes +0.0. A pass reads every key once and writes it once, through a
// buffer of one cache line a digit value, so that memory sees whole lines.
//
// Sums: a merge of both arrays that branches on no key lists the levels, then vectors add them up.
// Offsets inside a chunk are so small that all integer sums over it are exact in float64.
#include "cpu/roc_kernel.h"

#include <algorithm>

#include "common/order_key.h"
#include "cpu/simd.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

template <typename K>
constexpr K kSign = K(K(1) << (8 * sizeof(K) - 1));

template <typename K>
OODK_INLINE int digit_of(K key, int digit) {
  constexpr int bits = radix_bits(sizeof(K));
  return int(K(key ^ kSign<K>) >> (digit * bits)) & ((1 << bits) - 1);
}

// f(K{}) with the unsigned integer of `width` bytes.
template <typename F>
OODK_INLINE void with_width(int width, F f) {
  switch (width) {
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: return f(uint64_t{});
  }
}

void make_keys(const void* scores, int64_t stride, int width, int64_t inf_bits, int64_t begin,
    int64_t end, void* keys, int64_t* counts) {
  with_width(width, [&](auto zero) {
    using K = decltype(zero);
    constexpr int digits = radix_digits(sizeof(K));
    const K* bits = (const K*)scores;
    for (int64_t i = begin; i < end; ++i) {
      const K key = ((K*)keys)[i] = K(order_key_nan_last(bits[i * stride], inf_bits));
#pragma GCC unroll 8
      for (int digit = 0; digit < digits; ++digit)
        ++counts[digit * kRadix + digit_of(key, digit)];
    }
  });
}

void count(const void* keys, int width, int digit, int64_t begin, int64_t end, int64_t* counts) {
  with_width(width, [&](auto zero) {
    for (int64_t i = begin; i < end; ++i)
      ++counts[digit_of(((const decltype(zero)*)keys)[i], digit)];
  });
}

// Past the caches, which would first read the line.
OODK_INLINE void write_line(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, _mm512_load_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i)
    _mm256_stream_si256((__m256i*)to + i, _mm256_load_si256((const __m256i*)from + i));
#else
  std::memcpy(to, from, 64);
#endif
}

template <typename K>
OODK_INLINE void scatter_keys(
    const K* keys, int digit, int64_t begin, int64_t end, int64_t* places, K* out) {
  constexpr int64_t L = 64 / sizeof(K);
  constexpr int values = 1 << radix_bits(sizeof(K));
  alignas(64) K lines[values][L];
  int64_t first[values];
  std::memcpy(first, places, sizeof(first));
  // A line may begin before this digit's first place; that part of it is another's.
  const auto write_part = [&](int d, int64_t from, int64_t to) {
    from = from < first[d] ? first[d] : from;
    std::memcpy(out + from, &lines[d][from % L], size_t(to - from) * sizeof(K));
  };
  for (int64_t i = begin; i < end; ++i) {
    const K key = keys[i];
    const int d = digit_of(key, digit);
    const int64_t place = places[d]++;
    lines[d][place % L] = key;
    if (place % L == L - 1) {
      if (place + 1 - L >= first[d])
        write_line(out + (place + 1 - L), lines[d]);
      else
        write_part(d, place + 1 - L, place + 1);
    }
  }
  for (int d = 0; d < values; ++d)
    if (places[d] % L != 0 && places[d] > first[d])
      write_part(d, places[d] / L * L, places[d]);
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

void scatter(const void* keys, int width, int digit, int64_t begin, int64_t end, int64_t* places,
    void* out) {
  with_width(width, [&](auto zero) {
    using K = decltype(zero);
    scatter_keys((const K*)keys, digit, begin, end, places, (K*)out);
  });
}

// --- sums -----------------------------------------------------------------------------------------

constexpr int kWays = 3;
constexpr int64_t kRocSlack = kRocChunk / kWays + 1;

// Lists the points at which levels begin, as i and i + j, by a merge of n and m keys, then their
// end. It branches on no key: a point is written at every step and kept where the key is new.
// `has_more`: either array goes on, with greater keys, so that the merge need not mind their ends
// and thirds of it can run side by side; by kRocSlack keys, lest unsorted ones lead out of bounds.
template <typename K>
int64_t list_levels(const K* id, int64_t n, const K* ood, int64_t m, bool has_more, int32_t* at_i,
    int32_t* at_both) {
  const K least = n && (!m || id[0] <= ood[0]) ? id[0] : ood[0];
  int64_t count = 0, i = 0, both = 0;
  K last = K(~least); // the key before
  if (has_more) {
    const int64_t each = (n + m) / kWays;
    int32_t part_i[kWays][kRocChunk / kWays + 1], part_both[kWays][kRocChunk / kWays + 1];
    int64_t part_count[kWays] = {}, index[kWays];
    K before[kWays];
    for (int w = 0; w < kWays; ++w) {
      const int64_t i = index[w] = merge_path(id, n, ood, m, w * each), j = w * each - i;
      before[w] = i && (!j || id[i - 1] > ood[j - 1]) ? id[i - 1] : j ? ood[j - 1] : last;
    }
    for (int64_t s = 0; s < each; ++s)
#pragma GCC unroll kWays
      for (int w = 0; w < kWays; ++w) {
        const int64_t i = index[w], t = w * each + s;
        const K x = id[i], y = ood[t - i], key = x <= y ? x : y;
        part_i[w][part_count[w]] = int32_t(i);
        part_both[w][part_count[w]] = int32_t(t);
        part_count[w] += key != before[w];
        before[w] = key;
        index[w] = i + (x <= y);
      }
    for (int w = 0; w < kWays; ++w) {
      std::memcpy(at_i + count, part_i[w], part_count[w] * sizeof(*at_i));
      std::memcpy(at_both + count, part_both[w], part_count[w] * sizeof(*at_both));
      count += part_count[w];
    }
    both = kWays * each, last = before[kWays - 1];
    i = std::clamp(index[kWays - 1], both - m, n); // unsorted keys lead past an end
  }
  const auto take = [&](K key, bool from_id) {
    at_i[count] = int32_t(i);
    at_both[count] = int32_t(both++);
    count += key != last;
    last = key;
    i += from_id;
  };
  while (i < n && both - i < m)
    take(id[i] <= ood[both - i] ? id[i] : ood[both - i], id[i] <= ood[both - i]);
  while (i < n)
    take(id[i], true);
  while (both - i < m)
    take(ood[both - i], false);
  at_i[count] = int32_t(n);
  at_both[count] = int32_t(n + m);
  return count;
}

typedef int32_t offsets_t __attribute__((vector_size(kBytes / 2)));

OODK_INLINE vec<double> load_offsets(const int32_t* from) {
  offsets_t value;
  std::memcpy(&value, from, sizeof(value));
  return __builtin_convertvector(value, vec<double>);
}

// The lanes from the second of a to the first of b.
template <int... I>
OODK_INLINE vec<double> following(vec<double> a, vec<double> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I + 1)...);
}
OODK_INLINE vec<double> following(vec<double> a, vec<double> b) {
  return following(a, b, std::make_integer_sequence<int, lanes<double>>{});
}

template <typename K>
void sums_of(
    const K* id, int64_t n, const K* ood, int64_t m, RocPoint begin, RocPoint end, RocSums* sums) {
  constexpr int W = lanes<double>;
  int32_t at_i[kRocChunk + 2 * W], at_both[kRocChunk + 2 * W];
  const int64_t size_i = end.i - begin.i, size_j = end.j - begin.j;
  if (size_i + size_j <= 0)
    return;
  const int64_t count = list_levels(id + begin.i, size_i, ood + begin.j, size_j,
      end.i + kRocSlack <= n && end.j + kRocSlack <= m, at_i, at_both);
  // Vectors reach beyond the last point; what they find there is empty levels.
  for (int64_t k = count + 1; k < count + 2 * W; ++k) {
    at_i[k] = at_i[count];
    at_both[k] = at_both[count];
  }
  const vec<double> above = splat(double(n - begin.i)), below = splat(double(begin.j));
  const vec<double> all_above = splat(double(n - begin.i) + double(m - begin.j));
  const vec<double> all_below = splat(double(begin.i) + double(begin.j));
  const vec<double> one = splat(1.0), scale_n = splat(double(n)), scale_m = splat(double(m));
  struct Levels { // of adjacent levels
    vec<double> i, j, in, out;
  };
  const auto points_at = [&](int64_t k) {
    const vec<double> i = load_offsets(at_i + k), both = load_offsets(at_both + k), j = both - i;
    const vec<double> over = all_above - both, under = all_below + both;
    return Levels{i, j, over > 0 ? (above - i) / over : one, under > 0 ? (below + j) / under : one};
  };
  vec<double> wins{}, ties{}, id_squares{}, ood_squares{}, ap_in{}, ap_out{}, tz_in{}, tz_out{};
  vec<double> separation = splat(-std::numeric_limits<double>::infinity());
  Levels from = points_at(0);
  for (int64_t k = 0; k < count; k += W) {
    const Levels more = points_at(k + W);
    const Levels to{following(from.i, more.i), following(from.j, more.j),
        following(from.in, more.in), following(from.out, more.out)};
    const vec<double> a = to.i - from.i, b = to.j - from.j;
    const vec<double> p = from.j + to.j, q = from.i + to.i;
    wins += a * p;
    ties += a * b;
    id_squares += a * p * p;
    ood_squares += b * q * q;
    separation = max(separation, to.j * scale_n - to.i * scale_m);
    ap_in += a * from.in;
    ap_out += b * to.out;
    tz_in += a * (0.5 * (from.in + to.in));
    tz_out += b * (0.5 * (from.out + to.out));
    from = more;
  }
  // P = 2 begin.j + p and Q = 2 (n - begin.i) - q. Every local pair is in wins or its mirror.
  const uint128 w = uint128(reduce_add(wins)), mirror = 2 * uint128(size_i) * size_j - w;
  const uint128 p0 = uint128(2 * begin.j), q0 = uint128(2 * (n - begin.i));
  sums->wins += p0 * size_i + w;
  sums->ties += uint128(reduce_add(ties));
  sums->id_squares += p0 * p0 * size_i + 2 * p0 * w + uint128(reduce_add(id_squares));
  sums->ood_squares += q0 * q0 * size_j - 2 * q0 * mirror + uint128(reduce_add(ood_squares));
  const int128 local = int128(reduce_max(separation)) + int128(begin.j) * n - int128(begin.i) * m;
  sums->separation = local > sums->separation ? local : sums->separation;
  const vec<double> areas[] = {ap_in, ap_out, tz_in, tz_out};
  for (int k = 0; k < kRocAreas; ++k)
    sums->area[k] += reduce_add(areas[k]);
}

void sums(const void* id, int64_t n, const void* ood, int64_t m, int width, RocPoint begin,
    RocPoint end, RocSums* sums) {
  switch (width) {
    case 2: return sums_of((const int16_t*)id, n, (const int16_t*)ood, m, begin, end, sums);
    case 4: return sums_of((const int32_t*)id, n, (const int32_t*)ood, m, begin, end, sums);
    default: return sums_of((const int64_t*)id, n, (const int64_t*)ood, m, begin, end, sums);
  }
}

} // namespace

extern const RocKernels roc_kernels = {make_keys, count, scatter, sums};

} // namespace OODK_CPU_NS
} // namespace oodk
