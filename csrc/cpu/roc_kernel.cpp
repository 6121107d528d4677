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

#include "cpu/simd.h"

namespace oodk {
namespace OODK_CPU_NS {
namespace {

template <typename K>
constexpr K kSign = K(K(1) << (8 * sizeof(K) - 1));

template <typename K>
OODK_INLINE K key_of(K bits) { // K is unsigned
  const K negative = K(0) - (bits >> (8 * sizeof(K) - 1));
  const K key = bits ^ (negative & K(~kSign<K>));
  return key + (key == K(~K(0))); // -0.0
}

template <typename K>
OODK_INLINE int digit_of(K key, int digit) {
  constexpr int bits = radix_bits(sizeof(K));
  return int(K(key ^ kSign<K>) >> (digit * bits)) & ((1 << bits) - 1);
}

// f(K{}, read) with read(i) the i-th key.
template <typename F>
OODK_INLINE void with_reader(RadixSource source, F f) {
  const auto of_width = [&](auto zero) {
    using K = decltype(zero);
    const K* data = (const K*)source.data;
    const int64_t stride = source.stride;
    if (source.is_keys)
      f(zero, [=](int64_t i) { return data[i]; });
    else if (stride == 1)
      f(zero, [=](int64_t i) { return key_of(data[i]); });
    else
      f(zero, [=](int64_t i) { return key_of(data[i * stride]); });
  };
  switch (source.width) {
    case 2: return of_width(uint16_t{});
    case 4: return of_width(uint32_t{});
    default: return of_width(uint64_t{});
  }
}

void count_all(RadixSource source, int64_t begin, int64_t end, int64_t inf_bits, int64_t* counts,
    NanCount* nan) {
  with_reader(source, [&](auto zero, auto read) {
    using K = decltype(zero);
    constexpr int digits = radix_digits(sizeof(K));
    // Keys beyond those of both infinities: the largest magnitudes, as NaN's are.
    const K span = K(2 * K(inf_bits) + 1), low = K(~K(inf_bits));
    for (int64_t i = begin; i < end; ++i) {
      const K key = read(i);
      if (K(key - low) > span) [[unlikely]] {
        if (nan->count++ == 0)
          nan->first = i;
      }
#pragma GCC unroll 8
      for (int digit = 0; digit < digits; ++digit)
        ++counts[digit * kRadix + digit_of(key, digit)];
    }
  });
}

void count(RadixSource source, int64_t begin, int64_t end, int digit, int64_t* counts) {
  with_reader(source, [&](auto, auto read) {
    for (int64_t i = begin; i < end; ++i)
      ++counts[digit_of(read(i), digit)];
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

template <typename K, typename Read>
OODK_INLINE void scatter_keys(
    Read read, int64_t begin, int64_t end, int digit, int64_t* places, K* out) {
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
    const K key = read(i);
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

void scatter(
    RadixSource source, int64_t begin, int64_t end, int digit, int64_t* places, void* out) {
  with_reader(source, [&](auto zero, auto read) {
    scatter_keys(read, begin, end, digit, places, (decltype(zero)*)out);
  });
}

void copy(RadixSource source, int64_t begin, int64_t end, void* out) {
  with_reader(source, [&](auto zero, auto read) {
    for (int64_t i = begin; i < end; ++i)
      ((decltype(zero)*)out)[i] = read(i);
  });
}

// --- sums -----------------------------------------------------------------------------------------

// A merge of two arrays that lists the points at which levels begin. It branches on no key: a point
// is written at every step and kept where the key is new.
template <typename K>
struct Merge {
  const K *id, *ood;
  int32_t i, j;
  K last; // the key before
  int32_t *at_i, *at_j;
  int64_t count = 0;

  OODK_INLINE void take(K key, bool from_id) {
    at_i[count] = i;
    at_j[count] = j;
    count += key != last;
    last = key;
    i += from_id;
    j += !from_id;
  }
  OODK_INLINE void step() {
    const K x = id[i], y = ood[j];
    take(x <= y ? x : y, x <= y);
  }
};

// Levels of `size_i` and `size_j` keys, then their end. `has_more`: either array goes on, with
// greater keys, so that the merge need not mind their ends, and two halves can run side by side.
template <typename K>
int64_t list_levels(const K* id, const K* ood, int32_t size_i, int32_t size_j, bool has_more,
    int32_t* at_i, int32_t* at_j) {
  const K least = size_i && (!size_j || id[0] <= ood[0]) ? id[0] : ood[0];
  Merge<K> merge{id, ood, 0, 0, K(~least), at_i, at_j};
  if (has_more) {
    const int32_t half = (size_i + size_j) / 2;
    const int32_t i = int32_t(merge_path(id, size_i, ood, size_j, half)), j = half - i;
    const K before = i && (!j || id[i - 1] > ood[j - 1]) ? id[i - 1] : j ? ood[j - 1] : K(~least);
    int32_t more_i[kRocChunk / 2 + 1], more_j[kRocChunk / 2 + 1];
    Merge<K> more{id, ood, i, j, before, more_i, more_j};
    for (int32_t s = 0; s < half; ++s) {
      merge.step();
      more.step();
    }
    if ((size_i + size_j) % 2)
      more.step();
    std::memcpy(at_i + merge.count, more_i, more.count * sizeof(*at_i));
    std::memcpy(at_j + merge.count, more_j, more.count * sizeof(*at_j));
    merge.count += more.count;
  } else {
    while (merge.i < size_i && merge.j < size_j)
      merge.step();
    while (merge.i < size_i)
      merge.take(id[merge.i], true);
    while (merge.j < size_j)
      merge.take(ood[merge.j], false);
  }
  at_i[merge.count] = size_i;
  at_j[merge.count] = size_j;
  return merge.count;
}

typedef int32_t offsets_t __attribute__((vector_size(kBytes / 2)));

OODK_INLINE vec<double> load_offsets(const int32_t* from) {
  offsets_t value;
  std::memcpy(&value, from, sizeof(value));
  return __builtin_convertvector(value, vec<double>);
}

template <typename K>
void sums_of(const K* id, int64_t n, const K* ood, int64_t m, RocPoint begin, RocPoint end,
    RocSums* sums) {
  constexpr int W = lanes<double>;
  alignas(64) int32_t at_i[kRocChunk + 2 * W], at_j[kRocChunk + 2 * W];
  alignas(64) double in[kRocChunk + 2 * W], out[kRocChunk + 2 * W];
  const int64_t size_i = end.i - begin.i, size_j = end.j - begin.j;
  if (size_i + size_j <= 0)
    return;
  const int64_t count = list_levels(id + begin.i, ood + begin.j, int32_t(size_i), int32_t(size_j),
      end.i < n && end.j < m, at_i, at_j);
  // Vectors reach beyond the last point; what they find there is empty levels.
  const int64_t padded = count / W * W + 2 * W;
  for (int64_t k = count + 1; k < padded; ++k) {
    at_i[k] = at_i[count];
    at_j[k] = at_j[count];
  }
  const vec<double> above = splat(double(n - begin.i)), below = splat(double(begin.j));
  const vec<double> all_above = splat(double(n - begin.i) + double(m - begin.j));
  const vec<double> all_below = splat(double(begin.i) + double(begin.j));
  for (int64_t k = 0; k < padded; k += W) {
    const vec<double> i = load_offsets(at_i + k), j = load_offsets(at_j + k);
    const vec<double> p = (above - i) / (all_above - (i + j)), q = (below + j) / (all_below + (i + j));
    std::memcpy(in + k, &p, sizeof(p));
    std::memcpy(out + k, &q, sizeof(q));
  }
  if (end.i == n && end.j == m)
    for (int64_t k = count; k < padded; ++k)
      in[k] = 1; // 0 / 0: nothing is above
  if (begin.i + begin.j == 0)
    out[0] = 1;
  const vec<double> scale_n = splat(double(n)), scale_m = splat(double(m));
  vec<double> wins{}, ties{}, id_squares{}, ood_squares{}, ap_in{}, ap_out{}, tz_in{}, tz_out{};
  vec<double> separation = splat(-std::numeric_limits<double>::infinity());
  for (int64_t k = 0; k < count; k += W) {
    const vec<double> i = load_offsets(at_i + k), j = load_offsets(at_j + k);
    const vec<double> next_i = load_offsets(at_i + k + 1), next_j = load_offsets(at_j + k + 1);
    const vec<double> a = next_i - i, b = next_j - j;
    const vec<double> p = j + next_j, q = i + next_i;
    wins += a * p;
    ties += a * b;
    id_squares += a * p * p;
    ood_squares += b * q * q;
    separation = max(separation, next_j * scale_n - next_i * scale_m);
    const vec<double> in0 = load(in + k), in1 = load(in + k + 1);
    const vec<double> out0 = load(out + k), out1 = load(out + k + 1);
    ap_in += a * in0;
    ap_out += b * out1;
    tz_in += a * (0.5 * (in0 + in1));
    tz_out += b * (0.5 * (out0 + out1));
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

extern const RocKernels roc_kernels = {count_all, count, scatter, copy, sums};

} // namespace OODK_CPU_NS
} // namespace oodk
